"""A comparison as a grid: its cells, its table, what its rows equal, and what it keeps."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.comparison import TABLES
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.compare import pipeline
from lowmem_gblm.commands.compare.grid import Grid, cells
from lowmem_gblm.commands.compare.measures import evaluations
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.storage import atomic, pending_folder
from support.crashes import content
from support.tasks import write_made_up_tasks

Compare = Callable[..., list[dict[str, Any]]]
SEVEN = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@pytest.fixture
def asked(text_file: Path) -> dict[str, Any]:
    return {"nsamples": 2, "seqlen": 16, "calibration": str(text_file)}


@pytest.fixture
def measured(text_file: Path) -> dict[str, Any]:
    return {"text": str(text_file), "windows": 2}


@pytest.fixture
def compare(small: Path, tmp_path: Path, asked, measured) -> Compare:
    def call(*methods: str, output: str = "out", **options: Any) -> list[dict[str, Any]]:
        return lowmem_gblm.compare(small, methods, tmp_path / output, **asked | measured | options)

    return call


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the outputs that are pruned."""
    names: list[str] = []
    real = pipeline.prune
    monkeypatch.setattr(
        pipeline,
        "prune",
        lambda run, listener: names.append(run.output.name) or real(run, listener),
    )
    return names


def names(methods: str, method_options: dict[str, Any] | None = None, **varied: Any) -> list[str]:
    found = cells(
        PruneRequest(model="model"),
        Grid(methods=methods, **varied),
        method_options or {},
        Path("f"),
    )
    return [run.output.name for cell in found for run in cell.runs]


def test_outputs_are_named_by_what_varies() -> None:
    assert names("wanda,gblm") == ["wanda", "gblm"]
    assert names("wanda", sparsity=0.6) == ["wanda"]
    assert names("wanda", sparsity="0.50,0.6", pattern="2:4") == [
        "wanda-0.5",
        "wanda-0.6",
        "wanda-2x4",
    ]
    assert names("gblm,wanda", {"alpha": (1.0, 0.5)}) == ["gblm-alpha1", "gblm-alpha0.5", "wanda"]
    assert names("gblm", {"alpha": ("auto", 1.0)}) == ["gblm-auto", "gblm-alpha1"]
    assert names("gradient", {"gradient_norm": ["l1", "l2"]}) == ["gradient-l1", "gradient-l2"]
    assert names("magnitude,wanda", seeds=[0, 7]) == ["magnitude", "wanda-seed0", "wanda-seed7"]


@pytest.mark.parametrize(
    ("varied", "options"),
    [({"sparsity": "0.5,0.50"}, {}), ({"seeds": (1, 1)}, {}), ({}, {"alpha": (10, 10.0)})],
)
def test_a_value_that_is_given_twice_is_refused(varied, options) -> None:
    with pytest.raises(RequestError, match=r"the comparison has gblm.* twice: give every value"):
        names("gblm", options, **varied)


def test_an_alpha_that_is_chosen_is_told(compare: Compare, asked: dict[str, Any]) -> None:
    dense, row, plain = compare("gblm", alpha=["auto", 3.0], **{**asked, "nsamples": 3})
    assert row["options"]["alpha"] == "auto"
    (run,) = row["runs"]
    best = min(run["search"]["candidates"], key=lambda one: one["loss"])
    assert run["search"]["chosen"] == {"alpha": best["alpha"]}
    assert f"gblm at 0.5, seed 0, has chosen alpha {best['alpha']}" in row["notes"]
    assert not any("has chosen" in note for one in (dense, plain) for note in one["notes"])
    again = compare("gblm", alpha=["auto", 3.0], **{**asked, "nsamples": 3})
    assert again[1]["runs"] == row["runs"]


@pytest.mark.parametrize("activations", ["pruned", "dense"])
def test_rows_equal_single_runs_and_gradients_are_taken_once(
    activations: str, compare: Compare, small: Path, tmp_path: Path, asked, measured
) -> None:
    rows = compare("gradient", "gblm", alpha=[1, 100], pattern="2:4", activations=activations)
    assert [row["method"] for row in rows] == ["dense", "gradient", "gblm", "gblm"]
    passes = 0  # of gradients
    for row in rows[1:]:
        alone = tmp_path / "alone" / Path(row["output"]).name
        options = {} if row["method"] == "gradient" else {"alpha": row["options"]["alpha"]}
        lowmem_gblm.prune(
            small, alone, method=row["method"], pattern="2:4", activations=activations,
            **asked | options,
        )  # fmt: skip
        assert content(alone, card=False) == content(Path(row["output"]), card=False)
        single = lowmem_gblm.evaluate(alone, seqlen=16, **measured)
        assert row["perplexity"] == single["perplexity"]
        record = json.loads((Path(row["output"]) / "pruning.json").read_text())
        passes += "reverse" in record["seconds"]
        beside = json.loads((Path(row["output"]) / "evaluation-compare.json").read_text())
        assert beside["job"] == record["job"]
    assert passes == 1
    assert not (tmp_path / "out" / "statistics").exists()


def test_seeds_give_a_mean_and_a_standard_deviation(compare: Compare, tmp_path: Path) -> None:
    rows = compare("wanda", "magnitude", seeds=[0, 1])
    found = [
        json.loads((tmp_path / f"out/wanda-seed{seed}/evaluation-compare.json").read_text())
        for seed in (0, 1)
    ]
    values = [one["perplexity"] for one in found]
    assert values[0] != values[1]
    assert rows[1]["perplexity"] == fmean(values)
    assert rows[1]["perplexity_sd"] == stdev(values)
    assert rows[2]["perplexity_sd"] is None
    assert [len(row["runs"]) for row in rows] == [1, 2, 1]


@pytest.mark.parametrize("keep", ["none", "best"])
def test_what_is_not_kept_is_recorded_first_and_not_made_again(
    keep: str, compare: Compare, pruned: list[str], tmp_path: Path
) -> None:
    asked = {"sparsity": [0.5, 0.75], "keep": keep}
    rows = compare("wanda", "magnitude", **asked)
    left = {path.name for path in (tmp_path / "out").iterdir()} - {"comparison.json"}
    assert left == {Path(row["output"]).name for row in rows[1:] if row["output"]}
    best = {
        min((row for row in rows if row["goal"] == goal), key=lambda row: row["perplexity"])[
            "method"
        ]
        + f"-{goal}"
        for goal in ("0.5", "0.75")
    }
    assert left == (best if keep == "best" else set())
    del pruned[:]
    assert compare("wanda", "magnitude", **asked) == rows
    assert pruned == []
    if keep == "none":
        sentence = r"wanda-0\.5 was made otherwise \(activations: .*\): choose another place"
        with pytest.raises(JobError, match=sentence):
            compare("wanda", "magnitude", activations="dense", **asked)


def test_a_removal_that_was_killed_is_completed(compare: Compare, tmp_path: Path) -> None:
    rows = compare("wanda", "magnitude", keep="none")
    noted = json.loads((tmp_path / "out/comparison.json").read_text())["runs"]["wanda"]
    half = tmp_path / "out" / "wanda"
    half.mkdir()
    (half / "pruning.json").write_text(json.dumps({"job": noted["record"]["job"]}))
    (half / "model-00002-of-00003.safetensors").write_bytes(b"left")
    (tmp_path / "out" / "magnitude").mkdir()
    assert compare("wanda", "magnitude", keep="none") == rows
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.json"}


def test_a_run_whose_statistics_are_complete_before_its_output_resumes(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(partial: Path, final: Path) -> None:
        if final.name == "gradient":
            raise KeyboardInterrupt
        atomic.publish_folder(partial, final)

    with monkeypatch.context() as patch:
        patch.setattr(pending_folder, "publish_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare("gradient", "gblm")
    assert (tmp_path / "out/statistics/seed0-gradient_l1/statistics.json").exists()
    rows, others = compare("gradient", "gblm"), compare("gradient", "gblm", output="again")
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in others]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json", "gblm", "gradient",
    }  # fmt: skip


def test_one_seed_needs_no_list(
    compare: Compare, small: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    (_, row) = compare("wanda", seeds=3)
    assert [run["seed"] for run in row["runs"]] == [3]
    lowmem_gblm.prune(small, tmp_path / "alone", method="wanda", seed=3, **asked)
    assert content(tmp_path / "alone", card=False) == content(
        tmp_path / "out" / "wanda", card=False
    )


@pytest.mark.parametrize("option", ["statistics", "save_statistics"])
def test_statistics_of_other_runs_are_refused(option: str, tmp_path: Path) -> None:
    shared = PruneRequest(model="model", **{option: tmp_path / "statistics"})
    with pytest.raises(RequestError, match="a comparison saves statistics for its own runs"):
        cells(shared, Grid(), {}, tmp_path)


def test_an_output_of_another_run_is_never_removed(
    compare: Compare, small: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    lowmem_gblm.prune(small, tmp_path / "out" / "wanda", method="wanda", **asked)
    before = content(tmp_path / "out" / "wanda", card=False)
    rows = compare("wanda", "magnitude", keep="none")
    assert [row["output"] is None for row in rows] == [True, False, True]
    assert content(tmp_path / "out" / "wanda", card=False) == before
    again = tmp_path / "out" / "magnitude"
    lowmem_gblm.prune(small, again, method="magnitude", **asked)
    with pytest.raises(JobError, match="magnitude is not what was pruned there: move it away"):
        compare("wanda", "magnitude", keep="none")
    (again / "pruning.json").unlink()
    with pytest.raises(JobError, match=r"has no pruning\.json, so it is not removed"):
        compare("wanda", "magnitude", keep="none")
    assert (again / "config.json").exists()


def test_an_output_that_was_put_there_meanwhile_is_kept(
    compare: Compare, small: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    compare("magnitude")
    (tmp_path / "out" / "magnitude").rename(tmp_path / "moved")
    lowmem_gblm.prune(small, tmp_path / "out" / "magnitude", method="magnitude", **asked)
    (_, row) = compare("magnitude", keep="none")
    assert row["output"] is not None
    assert (tmp_path / "out" / "magnitude" / "pruning.json").exists()


def test_a_measure_that_was_not_asked_before_is_made(
    compare: Compare, pruned: list[str], tmp_path: Path
) -> None:
    compare("wanda", keep="none")
    compare("wanda", keep="all", windows=3)
    assert pruned == ["wanda", "wanda"]
    found = json.loads((tmp_path / "out/wanda/evaluation-compare.json").read_text())
    assert found["windows"] == 3


def test_another_file_of_that_name_is_not_touched(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison.json").write_text('{"mine": 1}')
    with pytest.raises(JobError, match="is not that of a comparison of this version"):
        compare("wanda")
    assert (tmp_path / "out/comparison.json").read_text() == '{"mine": 1}'


def test_rows_that_differ_in_their_zeros_say_so(compare: Compare) -> None:
    rows = compare("wanda", "magnitude", sparsity=0.55)
    # Rows of 16 and 48 weights lose 8 and 26; matrices of 128, 256 and 768 lose 70, 140 and 422.
    least, most = (1152 + 416) / 3072, (2 * 70 + 2 * 140 + 3 * 422) / 3072
    sentence = f"rows at 0.55 have from {least:.2%} to {most:.2%} zeros"
    assert [row["notes"][0].startswith(sentence) for row in rows[1:]] == [True, True]
    assert rows[0]["notes"] == []


def test_tasks_are_measured_with_questions_of_full_length(compare: Compare, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_made_up_tasks(tmp_path / "tasks")
    tasks = {"tasks": "endings", "include_path": tmp_path / "tasks", "limit": 4}
    rows = compare("wanda", **tasks)
    single = lowmem_gblm.evaluate(tmp_path / "out" / "wanda", **tasks)["results"]["endings"]
    found = rows[1]["tasks"]["endings"]
    assert found["metric"] == "acc,none"
    assert (found["value"], found["stderr"]) == (single["acc,none"], single["acc_stderr,none"])
    assert rows[1]["accuracy"] == found["value"]
    assert rows[1]["perplexity"] is not None


def test_text_and_tasks_are_one_sweep_unless_samples_have_a_length_of_their_own() -> None:
    given = {"text": "demo", "windows": 2, "tasks": "endings", "limit": 4}
    (both,) = evaluations(PruneRequest(model="model"), given)
    assert (both.text, both.tasks) == ("demo", ("endings",))
    text, tasks = evaluations(PruneRequest(model="model", seqlen=16), given)
    assert (text.text, text.windows, text.seqlen, text.tasks) == ("demo", 2, 16, ())
    assert (tasks.text, tasks.seqlen, tasks.tasks, tasks.limit) == (None, None, ("endings",), 4)


def row(method: str, alpha: float | None, goal: str | None) -> dict[str, Any]:
    tasks = {name: {"metric": "acc,none", "value": 0.5, "stderr": 0.0126} for name in SEVEN}
    return {
        "method": method, "goal": goal, "options": {} if alpha is None else {"alpha": alpha},
        "perplexity": 12.34567, "perplexity_sd": 0.01234, "tasks": tasks, "accuracy": 0.5,
        "sparsity": 0.5, "seconds": 12345.6, "host_peak_bytes": 1 << 33, "gpu_peak_bytes": 0,
        "output": None, "runs": [], "notes": [],
    }  # fmt: skip


def test_a_table_of_seven_tasks_fits_on_120_columns() -> None:
    rows = [row("dense", None, None), row("sparsegpt", None, "0.65"), row("gblm", 100.0, "2:4")]
    rows += [row("gblm", 1.0, "2:4")]
    lines = TABLES["table"](rows)
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == [
        "method", "goal", "alpha", "perplexity", "sparsity", "peak", "memory", "seconds",
    ]  # fmt: skip
    assert lines[3].split()[:6] == ["gblm", "2:4", "100", "12.346", "±", "0.012"]
    assert lines[9].split()[:6] == ["gblm", "2:4", "100", "50.0", "±", "1.3"]
    markdown = TABLES["markdown"](rows)
    assert markdown[0].startswith("| method | goal | alpha | perplexity |")
    assert len({line.count("|") for line in markdown[:6]} - {0}) == 1
    (first, *_) = csv.DictReader(TABLES["csv"](rows))
    assert first["method"] == "dense"
    assert first["alpha"] == ""
    assert float(first["arc_challenge_stderr"]) == 0.0126
    assert float(first["perplexity"]) == 12.34567


def test_the_grid_is_typed_with_commas(
    small: Path, text_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--nsamples", "2", "--seqlen", "16", "--calibration", str(text_file)]
    argv = [
        "compare",
        str(small),
        "--methods",
        "gblm,magnitude",
        "--alpha",
        "1, 10",
        *size,
        "--seeds",
        "2",
    ]
    argv += ["--text", str(text_file), "--windows", "1", "--keep", "none"]
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(one["method"], one["options"].get("alpha")) for one in rows] == [
        ("dense", None), ("gblm", 1.0), ("gblm", 10.0), ("magnitude", None),
    ]  # fmt: skip
    assert rows[1]["runs"][0]["seed"] == 2
    assert main([*argv, "--format", "csv"]) == 0
    captured = capsys.readouterr()
    found = list(csv.DictReader(captured.out.splitlines()))
    assert [one["perplexity"] for one in found] == [str(one["perplexity"]) for one in rows]
    said = "note: the statistic gradient_l1 was measured by the first run that needs it; "
    assert said in captured.err
    assert main([*argv, "--alpha", "1,x"]) == 2
    assert "argument --alpha: must be auto or a number from 0 on; got x" in capsys.readouterr().err
