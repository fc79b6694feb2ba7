"""What a user sees while a command takes its time, and what a repeated demo does not do again."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.actions import _demo_folder
from lowmem_gblm.cli.console import Console, announced
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.compare import pipeline
from lowmem_gblm.commands.compare.grid import Grid
from lowmem_gblm.commands.report.pipeline import report
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.commands.verify import verify
from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.runtime.progress import Tick
from support.crashes import ctrl_c


@pytest.fixture(scope="module")
def pruned(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be modified."""
    output = tmp_path_factory.mktemp("pruned") / "out"
    lowmem_gblm.prune(small, output, method="magnitude")
    return output


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[int, str, str]]:
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def answer(line: str) -> tuple[int, str, str]:
        return main(line.split()), *capsys.readouterr()

    return answer


# Listeners.


def steps(ticks: list[Tick]) -> list[tuple[str, int, int]]:
    return [(tick.stage, tick.step, tick.steps) for tick in ticks]


@pytest.mark.parametrize("compares", [False, True])
def test_verify_tells_of_every_shard_and_every_tensor(
    compares: bool, small: Path, pruned: Path
) -> None:
    ticks: list[Tick] = []
    found = verify(str(pruned), str(small) if compares else None, ticks.append)
    shards, tensors = found["hashed_shards"], found["tensors"]
    assert steps(ticks) == [
        *(("hashes", step, shards) for step in range(1, shards + 1)),
        *(("tensors", step, tensors) for step in range(1, tensors + 1)),
    ]
    assert ticks[-1].left_s == 0


def test_report_tells_of_every_mask(pruned: Path) -> None:
    ticks: list[Tick] = []
    masks = len(json.loads((pruned / "pruning.json").read_text())["tensors"])
    report(str(pruned), listener=ticks.append)
    assert steps(ticks) == [("masks", step, masks) for step in range(1, masks + 1)]


@pytest.mark.parametrize(
    ("command", "stages"), [("verify", ["hashes", "tensors"]), ("report", ["masks"])]
)
def test_both_are_seen_on_the_command_line(
    command: str, stages: list[str], pruned: Path, run: Callable[[str], tuple[int, str, str]]
) -> None:
    code, _, told = run(f"{command} {pruned}")
    assert (code, [line.split()[0] for line in told.splitlines()]) == (0, stages)


# What cannot be counted.


def test_a_slow_look_up_on_the_hub_is_announced(
    run: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: object, **options: object) -> str:
        time.sleep(0.1)
        raise OSError("no network")

    monkeypatch.setattr("lowmem_gblm.runtime.activity._FIRST_S", 0.01)
    monkeypatch.setattr("huggingface_hub.snapshot_download", slow)
    code, _, told = run("plan somebody/something")
    assert code == 3
    assert "looking up somebody/something on the Hub … 0 s\n" in told
    code, _, told = run("plan somebody/something -q")
    assert (code, told.count("\n")) == (3, 1)
    assert told.startswith("lowmem-gblm: there is no model folder somebody/something")


def test_the_verbose_see_the_plan_and_what_took_how_long(
    run: Callable[[str], tuple[int, str, str]], small: Path
) -> None:
    # Without a disk hidden states are held in memory, for a reason.
    line = f"eval {small} --text demo --seqlen 32 --windows 2 --disk 1B"
    code, _, told = run(f"{line} -v")
    assert code == 0
    assert re.search(r"^cutting the text into windows: \d+\.\d s$", told, re.MULTILINE)
    assert re.search(r"^planned: \S+ [KMG]iB of host memory\n.*host memory", told, re.MULTILINE)
    assert "planned" not in run(line)[2]


def test_the_log_of_the_package_is_left_as_it_was() -> None:
    log = logging.getLogger("lowmem_gblm")
    before = (log.level, log.propagate, list(log.handlers))
    stream = io.StringIO()
    with Console(stream) as console, announced(console, verbose=False):
        logging.getLogger("lowmem_gblm.commands").info("heard")
        logging.getLogger("lowmem_gblm.commands").debug("not heard")
        logging.getLogger("others").error("not heard")
    assert stream.getvalue() == "heard\n"
    assert (log.level, log.propagate, log.handlers) == before


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_colour() -> None:
    """Hence there is nothing that NO_COLOR would have to turn off."""
    terminal = Terminal()
    with Console(terminal) as console:
        console.announce("wanda: pruning")
        console(Tick(stage="dense", step=1, steps=1, stage_s=1, left_s=1, peak_bytes=2**30))
    assert gibibytes(2**30) in terminal.getvalue()
    assert not re.search(r"\x1b\[[\d;]*m", terminal.getvalue())


# The names of tensors.


def test_tensors_are_listed_with_their_shapes(
    run: Callable[[str], tuple[int, str, str]], small: Path, pruned: Path
) -> None:
    record = json.loads((pruned / "pruning.json").read_text())["tensors"]
    expected = {name: described["shape"] for name, described in record.items()}
    code, printed, _ = run(f"plan {small} --tensors --json")
    assert (code, json.loads(printed)) == (0, {"model": str(small), "tensors": expected})
    code, printed, _ = run(f"plan {small} --tensors")
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert lines == [[name, " × ".join(map(str, shape))] for name, shape in expected.items()]


def test_tensors_obey_globs_and_need_no_weights(
    run: Callable[[str], tuple[int, str, str]], small: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((small / "config.json").read_bytes())
    line = "plan model --tensors --include *.mlp.* --exclude *.1.*"
    code, printed, _ = run(line)
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()] == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    code, _, told = run("plan model --tensors --include *.mpl.*")
    assert code == 2
    assert "--include '*.mpl.*' matches no tensor that can be pruned" in told


# The demo.


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the demo a matter of a second: two methods that measure nothing, or little."""
    monkeypatch.setattr("lowmem_gblm.cli.parser.DEMO_METHODS", "magnitude,wanda")
    compare = pipeline.compare

    def briefly(
        shared: PruneRequest, grid: Grid, folder: Path, evaluation: object, *more: Any
    ) -> list[dict[str, Any]]:
        few = replace(shared, nsamples=2, seqlen=32)
        return compare(few, grid, folder, {"windows": 2}, *more)

    monkeypatch.setattr(pipeline, "compare", briefly)


@pytest.mark.usefixtures("brief")
def test_a_repeated_demo_resumes_one_that_was_interrupted(
    run: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        prune = pipeline.prune

        def interrupted(request: Any, listener: Any) -> dict[str, Any]:
            return ctrl_c() if request.method == "wanda" else prune(request, listener)

        patch.setattr(pipeline, "prune", interrupted)
        code, _, told = run("demo")
    assert code == 130
    assert told.endswith(
        "interrupted. What is pruned is kept in lowmem-gblm-demo. To resume:\nlowmem-gblm demo\n"
    )
    code, printed, told = run("demo")
    assert code == 0
    assert "magnitude: is pruned already\n" in told
    assert "lowmem-gblm-demo/wanda" in printed
    # What was finished is no longer touched.
    assert _demo_folder(["magnitude", "wanda"]) == Path("lowmem-gblm-demo-2")


@pytest.mark.usefixtures("brief")
def test_a_demo_in_a_folder_of_the_name_of_its_model_prunes_the_embedded_one(
    run: Callable[[str], tuple[int, str, str]], tmp_path: Path
) -> None:
    assert run("demo --output demo")[0] == 0
    code, _, told = run("demo --output demo")
    assert code == 0
    assert "magnitude: is pruned already\n" in told
    (tmp_path / "demo" / "config.json").touch()
    assert run("demo") == (2, "", (
        "lowmem-gblm: the folder demo here holds a model of your own, which has that name first: "
        "run the demo in another folder\n"
    ))  # fmt: skip


def test_a_demo_leaves_a_folder_alone_that_is_none_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _demo_folder(["magnitude"]) == Path("lowmem-gblm-demo")
    (tmp_path / "lowmem-gblm-demo").mkdir()
    assert _demo_folder(["magnitude"]) == Path("lowmem-gblm-demo-2")
