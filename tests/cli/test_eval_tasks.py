"""`eval --tasks`: what is typed, what is printed, and the sentences where it cannot be done."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lowmem_gblm
from lowmem_gblm.cli.console import evaluation_lines
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.request import EvalRequest
from lowmem_gblm.errors import BudgetError, NonFiniteError, RequestError
from lowmem_gblm.runtime.progress import Tick
from lowmem_gblm.runtime.signals import StopRequested
from lowmem_gblm.sweeps.batches import Score
from support.tasks import write_made_up_tasks

NAN = Score(float("nan"), False)
PACKAGE = Path(lowmem_gblm.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_made_up_tasks(folder)
    return folder


@pytest.fixture
def measure(small: Path, folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Measures "endings" of the made-up tasks with a tiny model."""

    def measure(**options: Any) -> dict[str, Any]:
        asked = {"tasks": "endings", "include_path": folder, "limit": 4, "work_dir": tmp_path}
        return lowmem_gblm.evaluate(small, **asked | options)

    return measure


def test_a_table_is_printed_and_nothing_of_the_harness(
    small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["eval", str(small), "--tasks", "endings,stories", "--include-path", str(folder),
         "--num-fewshot", "1", "--limit", "4"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == ["task", "shots", "metric", "value", "stderr"]
    assert [line[:3] for line in lines[1:]] == [
        ["endings", "1", "acc"],
        ["endings", "1", "acc_norm"],
        ["stories", "1", "bits_per_byte"],
    ]
    assert [line.split()[0] for line in captured.err.splitlines()] == ["embed", "dense", "head"]


def test_json_has_the_shape_of_the_harness(
    small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--tasks", "endings", "--include-path", str(folder), "--limit", "4", "--json"]
    assert main(["eval", str(small), *tasks]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["results"]["endings"]["acc,none"] <= 1
    assert found["results"]["endings"]["acc_norm_stderr,none"] >= 0
    assert found["n-shot"] == {"endings": 0}
    assert found["n-samples"] == {"endings": {"original": 12, "effective": 4}}
    assert found["lm_eval_version"] == metadata.version("lm_eval")
    assert found["model"] == str(small)
    assert found["seconds"]["total"] > 0
    assert found["memory"]["host_peak_bytes"] > 0
    assert "perplexity" not in found


def test_text_and_tasks_are_both_printed() -> None:
    result = {"perplexity": 2.0, "text": "a", "windows": 3, "seqlen": 4, "n-shot": {"b": 0}}
    result["results"] = {"b": {"alias": "b", "f1,strict": 0.5, "f1_stderr,strict": "N/A"}}
    assert evaluation_lines(result) == [
        "perplexity 2.0000 on a (3 windows of 4 tokens)",
        "task  shots  metric      value  stderr",
        "b         0  f1,strict  0.5000",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": (), "limit": 4}, "--limit is about tasks: name some with --tasks"),
        ({"limit": 0}, "--limit must be at least 1; got 0"),
        ({"num_fewshot": -1}, "--num-fewshot must be at least 0; got -1"),
        ({"include_path": Path("nowhere")}, "--include-path nowhere is not a folder"),
        ({"tasks": "writing"}, "the task writing lets the model write text, and a streamed model"),
        ({"seqlen": 1 << 20}, "is beyond the 128 positions of the model"),
        ({"seqlen": 2}, "a task has an answer of 14 tokens, and the model reads 2 at most"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    measure: Callable[..., dict[str, Any]], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(sentence)):
        measure(**{"include_path": None} | options if options.get("tasks") == () else options)


def test_an_unknown_task_is_refused_with_near_names(
    measure: Callable[..., dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # The harness's own tasks are 15,000.
    index = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: index)
    with pytest.raises(RequestError, match="there is no task 'ending': did you mean endings"):
        measure(tasks=["ending"])
    with pytest.raises(RequestError, match="there is no task 'xyz': see lm_eval ls tasks"):
        measure(tasks="xyz")
    assert set(measure(tasks="*ings")["results"]) == {"endings"}


def test_a_task_whose_data_is_missing_is_named(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n"
    )
    with pytest.raises(RequestError, match=r"the task gone cannot be loaded: .*include-path"):
        measure(tasks="gone", include_path=tmp_path)


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        (None, "--tasks needs lm-evaluation-harness: pip install 'lowmem-gblm[eval]'"),
        ("0.4.5", "--tasks needs lm-evaluation-harness >=0.4.12,<0.5, 0.4.5 is installed: pip"),
    ],
)
def test_without_the_harness_a_sentence_says_how_to_install_it(
    measure: Callable[..., dict[str, Any]],
    installed: str | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(package: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(RequestError, match=re.escape(sentence)):
        measure()


def test_a_budget_is_kept_or_refused(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match=r"this run needs at least .* of host memory"):
        measure(cpu_memory=1 << 20)
    plain = measure()
    assert measure(disk=1)["results"] == plain["results"]
    # Of the smallest batches at last.
    monkeypatch.setattr("lowmem_gblm.commands.scoring.plan", refusing_batches_beyond(200))
    assert measure()["results"] == plain["results"]


def refusing_batches_beyond(tokens: int) -> Callable[..., Any]:
    from lowmem_gblm.commands.scoring import plan

    def refusing(work: Any, budget: Any, **kept: Any) -> Any:
        if work.seqlen > tokens:
            raise BudgetError("too large")
        return plan(work, budget, **kept)

    return refusing


def test_answers_that_are_nan_are_refused(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lowmem_gblm.sweeps.batches.Batch.scores",
        lambda batch, *found: [(row, NAN) for rows in batch.sequences for row in rows],
    )
    with pytest.raises(NonFiniteError, match="of 16 answers have no log-probability: it is NaN"):
        measure()


@pytest.mark.parametrize("stage", ["embed", "dense", "head"])
def test_stopped_tasks_are_resumed(
    measure: Callable[..., dict[str, Any]], stage: str, tmp_path: Path
) -> None:
    plain = measure()

    def listener(tick: Tick) -> None:
        if tick.stage == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        measure(listener=listener)
    assert any(tmp_path.glob("*/journal/*")) == (stage != "embed")
    assert measure()["results"] == plain["results"]
    assert not list(tmp_path.iterdir())


def test_names_are_taken_as_a_list_or_as_typed() -> None:
    for tasks in ("a, b,a", ["a", "b"], ("a,b",)):
        assert EvalRequest(model="demo", tasks=tasks).tasks == ("a", "b")
    assert not EvalRequest(model="demo", tasks="a").measures_text
    assert EvalRequest(model="demo", tasks="a", text="demo").measures_text


def imported_at_once(path: Path) -> set[str]:
    """What importing a file imports, as far as it says so itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_other_command_imports_the_harness() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "harness.py":
            imported = imported_at_once(path)
            assert "lowmem_gblm.commands.harness" not in imported, path
            assert not {name for name in imported if name.split(".")[0] == "lm_eval"}, path
            if path.name != "tasks.py":
                assert "lm_eval" not in path.read_text(), path
