"""Ctrl-C and SIGTERM at any moment: exit code 130, what is kept, and a command that goes on."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli import actions
from lowmem_gblm.cli import main as cli
from lowmem_gblm.cli.console import Console
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.model.tokenizer import _tokenizer_errors
from lowmem_gblm.runtime.progress import Tick
from lowmem_gblm.runtime.signals import StopRequested
from lowmem_gblm.storage import atomic
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from support.crashes import SIGNALS, content, ctrl_c, out_of_memory
from support.tiny_models import save_tiny

MOMENTS = 8
MOST_MOMENTS = 200
KEPT = r"lowmem-gblm: interrupted\. What is done is kept in (\S+|'.*')\. To resume:"
NOTHING = r"lowmem-gblm: interrupted\. Nothing was done yet that could be kept\. To begin again:"
STOPPING = "lowmem-gblm: interrupted: stopping after the current sample. Once more ends at once"
ENDED = "lowmem-gblm: ended at once. To resume, or to begin again:"
WHOLE = r"lowmem-gblm: interrupted, but \S+ is complete already\."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its name needs quotes in a shell."""
    return save_tiny("llama", tmp_path_factory.mktemp("it's") / "a model", blocks=2, width=32)


@pytest.fixture
def argv(model: Path, text_file: Path, tmp_path: Path) -> list[str]:
    return arguments(model, tmp_path / "out", text_file)


def arguments(model: Path, output: Path, text: Path) -> list[str]:
    size = ["--nsamples", "4", "--seqlen", "64", "--calibration", str(text)]
    return ["prune", str(model), str(output), *size]


@pytest.fixture(scope="module")
def expected(
    model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], float]:
    """What an undisturbed run writes, and how many seconds it takes."""
    output = tmp_path_factory.mktemp("expected") / "out"
    start = time.monotonic()
    assert cli.main(arguments(model, output, text_file)) == 0
    return content(output), time.monotonic() - start


class Child:
    """A command in a forked process, whose stderr goes to a file. Comes back once it has begun."""

    def __init__(
        self, argv: list[str], log: Path, ignoring: int | None = None, program: str = "lowmem-gblm"
    ) -> None:
        self._log, self._program = log, program
        begun, to_begin = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(argv, to_begin, ignoring)
        os.close(to_begin)
        os.read(begun, 1)
        os.close(begun)

    def _be(self, argv: list[str], to_begin: int, ignoring: int | None) -> None:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if ignoring is not None:
                signal.signal(ignoring, signal.SIG_IGN)
            log = self._log.open("w", buffering=1)
            os.dup2(log.fileno(), 2)
            sys.stderr = log
            run = actions.prune

            def announced(*given: object) -> object:
                os.write(to_begin, b".")
                return run(*given)

            actions.prune = announced
            sys.argv = [self._program, *argv]
            code = cli.main()
        finally:
            os._exit(code)

    def ended(self) -> tuple[int, list[str]]:
        """Waits for it; its exit code and the lines it wrote."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        text = self._log.read_text()
        assert "Traceback" not in text
        return code, text.splitlines()


def goes_on(
    code: int, lines: list[str], output: Path, expected: dict[str, str], *, dropped: bool = False
) -> None:
    """A run that was interrupted says so, and the command that it printed gives the same bytes.

    Where Python may have `dropped` what the signal raised, as in the callback of a weak reference,
    it may instead have ended at once, without a word of what it has kept.
    """
    if code == 0:
        assert content(output) == expected
        return
    assert code == 130, lines
    at_once = dropped and lines[-2:-1] == [ENDED]
    if re.fullmatch(WHOLE, lines[-1]) or (at_once and output.exists()):
        assert content(output) == expected
        return
    work_folder = output.with_name("out.work")
    if not at_once:
        assert re.fullmatch(f"{KEPT}|{NOTHING}", lines[-2]), lines
        has_steps = any(work_folder.glob("journal/*.json"))
        assert has_steps == bool(re.fullmatch(KEPT, lines[-2]))
    assert not output.exists()
    program, *again = shlex.split(lines[-1])
    assert program == "lowmem-gblm"
    assert cli.main(again) == 0
    assert content(output) == expected
    assert not work_folder.exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_at_random_moments(
    number: signal.Signals,
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
) -> None:
    chance, interrupted, seconds = random.Random(int(number)), 0, expected[1]
    for moment in range(MOST_MOMENTS):
        # However busy the machine is, enough of them are to hit.
        if moment >= MOMENTS and interrupted > MOMENTS / 4:
            break
        child = Child(argv, tmp_path / "log")
        time.sleep(chance.uniform(0, seconds))
        os.kill(child.pid, number)
        code, lines = child.ended()
        interrupted += code == 130
        # Some are to end, and some not, however busy the machine is.
        seconds *= 1.05 if code == 130 else 0.9
        # A random moment is rarely one at which Python drops what is raised.
        goes_on(code, lines, tmp_path / "out", expected[0], dropped=True)
        shutil.rmtree(tmp_path / "out")
    assert interrupted > MOMENTS / 4


def test_a_signal_that_python_drops_ends_at_once(
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    prune = actions.prune

    def dropping(*given: Any) -> object:
        Late()
        return prune(*given)

    with monkeypatch.context() as patch:
        patch.setattr(actions, "prune", dropping)
        code, lines = Child(argv, tmp_path / "log").ended()
    assert (code, lines[:-1]) == (130, [ENDED])
    goes_on(code, lines, tmp_path / "out", expected[0], dropped=True)


def test_a_signal_while_the_display_of_progress_is_freed_is_no_second_one(
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python runs a callback when a handler of `logging` goes, and drops what that raises."""
    forget = logging._removeHandlerRef

    def interrupted(reference: object) -> None:
        forget(reference)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(logging, "_removeHandlerRef", interrupted)
        code, lines = Child(argv, tmp_path / "log").ended()
    assert (code, [line for line in lines if "ended at once" in line]) == (0, [])
    assert content(tmp_path / "out") == expected[0]


def test_interrupted_while_the_output_gets_its_place(
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        if target == tmp_path / "out":
            signal.raise_signal(signal.SIGINT)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "rename", renamed)
        code, lines = Child(argv, tmp_path / "log").ended()
    assert (code, lines[-2]) == (130, STOPPING)
    assert re.fullmatch(WHOLE, lines[-1])
    assert content(tmp_path / "out") == expected[0]


def at_tick(
    monkeypatch: pytest.MonkeyPatch, stage: str, step: int, act: Callable[[], object]
) -> None:
    """Let a command do something when so many steps of a stage are done."""

    def display(display: Console, tick: Tick) -> None:
        if (tick.stage, tick.step) == (stage, step):
            act()

    monkeypatch.setattr(Console, "__call__", display)


STEPS = [
    *(("embed", 1), ("embed", 4), ("dense", 1), ("dense", 2), ("head", 1), ("head", 4)),
    *(("reverse", 1), ("reverse", 2), ("prune", 1), ("prune", 2)),
]


@pytest.mark.parametrize(("stage", "step"), STEPS)
def test_interrupted_at_any_stage(
    stage: str,
    step: int,
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last step of `prune` is followed by the copy of what lies outside of the blocks."""
    with monkeypatch.context() as patch:
        at_tick(patch, stage, step, lambda: signal.raise_signal(signal.SIGINT))
        code, lines = Child(argv, tmp_path / "log").ended()
    assert (code, len(lines), lines[0]) == (130, 3, STOPPING)
    goes_on(code, lines, tmp_path / "out", expected[0])


@pytest.mark.parametrize(("stage", "step"), STEPS[::3])
@pytest.mark.parametrize("first", SIGNALS)
def test_the_second_signal_ends_at_once(
    first: signal.Signals,
    stage: str,
    step: int,
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def twice() -> None:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
        time.sleep(600)

    with monkeypatch.context() as patch:
        at_tick(patch, stage, step, twice)
        code, lines = Child(argv, tmp_path / "log").ended()
    assert (code, lines[:-1]) == (130, [STOPPING, ENDED])
    assert not (tmp_path / "out").exists()
    assert cli.main(shlex.split(lines[-1])[1:]) == 0
    assert content(tmp_path / "out") == expected[0]


@pytest.mark.parametrize(("stage", "step"), [("dry_run", 1), ("prune", 1), ("prune", 2)])
def test_a_job_in_place_is_stopped_and_goes_on(
    stage: str,
    step: int,
    prune_in_place: Callable[..., dict[str, Any]],
    small: Path,
    tmp_path: Path,
) -> None:
    def listener(tick: Tick) -> None:
        if (tick.stage, tick.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)

    names = ("whole/model", "model")
    whole, stopped = (Path(shutil.copytree(small, tmp_path / name)) for name in names)
    prune_in_place(whole, method="wanda")
    with pytest.raises(StopRequested):
        prune_in_place(stopped, method="wanda", listener=listener)
    assert prune_in_place(stopped, method="wanda")["attempts"] == 2
    assert content(stopped) == content(whole)


def test_after_a_signal_no_sample_and_no_matrix_is_begun(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt is stopped in the middle of a piece of work, and later than the one before."""
    begun: list[str] = []
    last: list[str] = []

    def counted(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def counting(self: object, *args: object, **options: object) -> object:
            begun.append(name)
            if len(begun) == 5 + len(last):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args, **options)

        monkeypatch.setattr(owner, name, counting)

    asked = {"nsamples": 4, "seqlen": 64, "calibration": str(text_file)}
    lowmem_gblm.prune(model, tmp_path / "whole", **asked)
    counted(StreamedModel, "forward_block")
    counted(BlockPruner, "decide")
    while True:
        begun.clear()
        try:
            lowmem_gblm.prune(model, tmp_path / "out", **asked)
        except StopRequested:
            # The first sample of a block is computed twice, to see what gradients need.
            assert begun[5 + len(last) :] in ([], ["forward_block"])
            last.append(begun[4 + len(last)])
        else:
            break
    assert set(last) == {"forward_block", "decide"}
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_that_memory_stops_goes_on(
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        at_tick(patch, "dense", 1, lambda: out_of_memory(patch))
        code, lines = Child([*argv, "--cpu-memory", "8GiB"], tmp_path / "log").ended()
    assert (code, len(lines)) == (4, 1)
    assert lines[0].startswith("lowmem-gblm: this process has taken 1073741824.00 GiB of host")
    assert cli.main(argv) == 0
    assert content(tmp_path / "out") == expected[0]
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["attempts"] == 2


IMPORTING = """
import importlib.abc, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lowmem_gblm.cli.main import main

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["lowmem-gblm", "plan", "demo"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        "torch._tensor",
        pytest.param("torch.nn", marks=pytest.mark.slow),
        "transformers.utils",
    ],
)
def test_interrupted_while_libraries_are_imported(name: str) -> None:
    program = [sys.executable, "-c", IMPORTING.format(name=name)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert "Traceback" not in ended.stderr
    assert ended.stderr.endswith(
        "lowmem-gblm: interrupted. Nothing half-done is left. To begin again:\n"
        "lowmem-gblm plan demo\n"
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(
    number: signal.Signals,
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
) -> None:
    child = Child(argv, tmp_path / "log", number)
    for _ in range(5):
        time.sleep(expected[1] / 10)
        os.kill(child.pid, number)
    assert child.ended()[0] == 0
    assert content(tmp_path / "out") == expected[0]


def test_the_printed_command_can_be_pasted_into_a_shell(
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        at_tick(patch, "dense", 1, lambda: signal.raise_signal(signal.SIGTERM))
        child = Child(argv, tmp_path / "log", program="/lib/lowmem_gblm/__main__.py")
        code, lines = child.ended()
    assert code == 130
    assert lines[-1].startswith(f"{sys.executable} -m lowmem_gblm prune ")
    assert subprocess.run(["bash", "-c", lines[-1]], capture_output=True).returncode == 0
    assert content(tmp_path / "out") == expected[0]


@pytest.mark.parametrize(
    ("called", "found", "program"),
    [
        ("/opt/bin/lowmem-gblm", "/opt/bin/lowmem-gblm", ["lowmem-gblm"]),
        ("/opt/bin/lowmem-gblm", None, ["/opt/bin/lowmem-gblm"]),
        ("/lib/lowmem_gblm/__main__.py", None, [sys.executable, "-m", "lowmem_gblm"]),
    ],
)
def test_the_printed_command_is_called_as_this_one_was(
    called: str, found: str | None, program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(cli.shutil, "which", lambda name: found)
    assert cli._program() == program


@pytest.mark.parametrize(("entry", "said"), [("000000.json", KEPT), ("000000.json.tmp", NOTHING)])
def test_only_a_finished_step_is_said_to_be_kept(
    entry: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out.work" / "journal").mkdir(parents=True)
    (tmp_path / "out.work" / "job.json").touch()
    (tmp_path / "out.work" / "journal" / entry).touch()
    monkeypatch.setattr("lowmem_gblm.commands.prune.pipeline.prune", ctrl_c)
    assert cli.main(["prune", "model", str(tmp_path / "out")]) == 130
    assert re.match(said, capsys.readouterr().err)


def test_a_tokenizer_that_is_not_even_begun_with_is_not_blamed(tmp_path: Path) -> None:
    """As when Ctrl-C comes between the making of a context and the entering of it."""
    made = _tokenizer_errors(tmp_path)
    made.__enter__()
    made.gen.close()


def test_an_interrupted_resume_says_where_the_job_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowmem_gblm.commands.prune.resume.find_job", ctrl_c)
    assert cli.main(["resume", "my out.work"]) == 130
    error = capsys.readouterr().err
    assert "What is done is kept in my out.work. To resume:" in error
    assert error.endswith("\nlowmem-gblm resume 'my out.work'\n")


def test_an_interruption_after_the_end_of_a_resumed_job_says_that_the_output_is_whole(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_gblm.commands.prune.pipeline.run_record", ctrl_c)
        assert cli.main(argv) == 130
    monkeypatch.setattr(cli, "_print", ctrl_c)
    assert cli.main(["resume", str(tmp_path / "out.work")]) == 130
    assert re.search(f"{WHOLE}\n$", capsys.readouterr().err)


def test_an_interruption_after_the_end_says_that_the_output_is_whole(
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_print", ctrl_c)
    assert cli.main(argv) == 130
    assert re.search(f"{WHOLE}\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("function", "argv"),
    [
        ("commands.plan.plan_request", ["plan", "demo"]),
        ("commands.evaluate.evaluate", ["eval", "demo"]),
        ("commands.verify.verify", ["verify", "my out"]),
    ],
)
def test_what_keeps_nothing_leaves_nothing_half_done(
    function: str,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(f"lowmem_gblm.{function}", ctrl_c)
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == (
        f"lowmem-gblm: interrupted. Nothing half-done is left. To begin again:\n"
        f"{shlex.join(['lowmem-gblm', *argv])}\n"
    )
