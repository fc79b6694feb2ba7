"""Ctrl-C and SIGTERM at any moment: exit code 130, what is kept, and a command that goes on."""

from __future__ import annotations

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

import pytest
from interruptions import SIGNALS, both_at_once, content, ctrl_c
from tiny import save_tiny

from lowmem_gblm.cli import main as cli
from lowmem_gblm.errors import CheckpointError
from lowmem_gblm.model.tokenizer import _tokenizer_errors
from lowmem_gblm.storage import atomic

MOMENTS = 20
KEPT = r"lowmem-gblm: interrupted\. What is done is kept in (\S+|'.*')\. To go on:"
NOTHING = r"lowmem-gblm: interrupted\. Nothing was done yet that could be kept\. To begin again:"
WHOLE = r"lowmem-gblm: interrupted, but \S+ is whole already\."


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

    def __init__(self, argv: list[str], log: Path, ignoring: int | None = None) -> None:
        self._log = log
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
            sys.stderr = self._log.open("w", buffering=1)
            run = cli._prune

            def announced(arguments: object) -> int:
                os.write(to_begin, b".")
                return run(arguments)

            cli._prune = announced
            sys.argv = ["lowmem-gblm", *argv]
            code = cli.main()
        finally:
            os._exit(code)

    def ended(self) -> tuple[int, list[str]]:
        """Waits for it; its exit code and the lines it wrote."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        text = self._log.read_text()
        assert "Traceback" not in text
        return code, text.splitlines()


def goes_on(code: int, lines: list[str], output: Path, expected: dict[str, str]) -> None:
    """A run that was interrupted says so, and the command that it printed gives the same bytes."""
    if code == 0:
        assert content(output) == expected
        return
    assert code == 130, lines
    if re.fullmatch(WHOLE, lines[-1]):
        assert content(output) == expected
        return
    assert re.fullmatch(f"{KEPT}|{NOTHING}", lines[-2]), lines
    work_folder = output.with_name("out.work")
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
    for _ in range(MOMENTS):
        child = Child(argv, tmp_path / "log")
        time.sleep(chance.uniform(0, seconds))
        os.kill(child.pid, number)
        code, lines = child.ended()
        interrupted += code == 130
        # Some are to end, and some not, however busy the machine is.
        seconds *= 1.05 if code == 130 else 0.9
        goes_on(code, lines, tmp_path / "out", expected[0])
        shutil.rmtree(tmp_path / "out")
    assert interrupted > MOMENTS / 4


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13, 21, -2, -1])
@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_interrupted_during_a_commit(
    name: str,
    at: int,
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    real = getattr(os, name)

    def counting(*args: object) -> None:
        nonlocal calls
        calls += 1
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, name, counting)
        assert cli.main(argv) == 0
    shutil.rmtree(tmp_path / "out")
    left = at if at > 0 else calls + 1 + at

    def interrupting(*args: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            signal.raise_signal(signal.SIGINT)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, name, interrupting)
        code, lines = Child(argv, tmp_path / "log").ended()
    goes_on(code, lines, tmp_path / "out", expected[0])


def unwound_badly() -> None:
    """What torch does where an interruption meets it between two steps of its mode stack."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("trying to pop from empty mode stack") from None


def refused_late() -> None:
    """What our own code makes of an error that it knows."""
    try:
        unwound_badly()
    except RuntimeError:
        raise CheckpointError("the file ends early") from None


@pytest.mark.parametrize("interrupt", [unwound_badly, both_at_once, refused_late])
@pytest.mark.parametrize(
    "at",
    [
        "commands.prune.pipeline.open_setup",
        "commands.prune.session.SweepContext.write",
        "commands.prune.pipeline.record",
    ],
)
def test_nothing_comes_between_an_interruption_and_its_message(
    at: str,
    interrupt: Callable[[], None],
    argv: list[str],
    expected: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"lowmem_gblm.{at}", lambda *args: interrupt())
        code, lines = Child(argv, tmp_path / "log").ended()
    assert code == 130, lines
    goes_on(code, lines, tmp_path / "out", expected[0])


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
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    undisturbed, output = (
        # Long enough for the signal to arrive on a busy machine.
        [*arguments(model, tmp_path / name, text_file), "--nsamples", "128"]
        for name in ("undisturbed", "out")
    )
    command = [sys.executable, "-m", "lowmem_gblm", *output]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("embed")
        process.send_signal(signal.SIGTERM)
        lines = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert lines[-1].startswith(f"{sys.executable} -m lowmem_gblm prune ")
    assert subprocess.run(["bash", "-c", lines[-1]], capture_output=True).returncode == 0
    assert cli.main(undisturbed) == 0
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


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
    assert "What is done is kept in my out.work. To go on:" in error
    assert error.endswith("\nlowmem-gblm resume 'my out.work'\n")


def test_an_interruption_after_the_end_of_a_resumed_job_says_that_the_output_is_whole(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_gblm.commands.prune.pipeline.record", ctrl_c)
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
        ("commands.prune.pipeline.make_plan", ["plan", "demo"]),
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
