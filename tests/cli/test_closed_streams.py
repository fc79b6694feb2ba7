"""Nobody listens: stderr or stdout is closed, full or gone. No run is lost, no noise is made."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from lowmem_gblm.cli.console import Console
from lowmem_gblm.cli.main import main
from lowmem_gblm.runtime.progress import Tick

FULL = Path("/dev/full")
NOWHERE = "lowmem-gblm: {}: while writing\n"
TICK = Tick(stage="dense", step=1, steps=1, stage_s=0, peak_bytes=0, left_s=None)

needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


class Gone(io.StringIO):
    """A stream that fails, and counts how often it is asked."""

    def __init__(self, error: Exception, *, terminal: bool) -> None:
        super().__init__()
        self.asked = 0
        self._error = error
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.asked += 1
        raise self._error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("I/O operation on closed file."),
    ],
    ids=["closed terminal", "closed pipe", "full disk", "closed file"],
)
def test_a_display_that_nobody_sees_falls_silent_for_good(error: Exception, terminal: bool) -> None:
    stream = Gone(error, terminal=terminal)
    with Console(stream) as display:
        display(TICK)
        display.announce("wanda")
        display(TICK)
    assert stream.asked == 1


def test_a_display_without_a_stream_is_silent() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        with Console(stream) as display:
            display(TICK)


def test_a_terminal_that_was_closed_ends_no_run() -> None:
    here, there = pty.openpty()
    with open(there, "w") as stream, Console(stream) as display:
        display(TICK)
        os.close(here)
        display.announce("wanda")
        display(TICK)


def command(*argv: object, out: IO[str] | int, err: IO[str] | int) -> subprocess.Popen[str]:
    typed = [sys.executable, "-m", "lowmem_gblm", *map(str, argv)]
    return subprocess.Popen(typed, stdout=out, stderr=err, text=True)


def printed_nowhere(*argv: object, closed: bool = False) -> tuple[int, str]:
    """The exit code of a command whose stdout is full, or a closed pipe, and its stderr."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, open(os.devnull if closed else FULL, "w") as full:
        process = command(*argv, out=pipe if closed else full, err=subprocess.PIPE)
        _, error = process.communicate()
    # What takes long on a busy machine is announced.
    lines = [line for line in error.splitlines(keepends=True) if " … " not in line]
    return process.returncode, "".join(lines)


def test_what_is_on_the_disk_is_not_lost_with_stdout(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone(full, terminal=False))
        assert main(["prune", str(llama), str(output), "--method", "magnitude"]) == 0
    *progress, told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in progress] == ["prune", "finish"]
    assert told == (
        f"lowmem-gblm: the result could not be printed ([Errno 28] No space left on device): it is "
        f"in {output / 'pruning.json'}"
    )
    assert json.loads((output / "pruning.json").read_text())["method"] == "magnitude"


def test_a_run_ends_well_though_stderr_is_full(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Gone(OSError(errno.ENOSPC, "full"), terminal=False))
    assert main(["prune", str(llama), str(tmp_path / "out"), "--method", "magnitude"]) == 0
    assert capsys.readouterr().out.endswith(f"the checkpoint is {tmp_path / 'out'}\n")


@needs_full
@pytest.mark.parametrize("argv", [["--version"], ["prune", "--help"]])
def test_what_nobody_reads_is_a_failure_and_no_noise(argv: list[str]) -> None:
    assert printed_nowhere(*argv) == (4, NOWHERE.format("No space left on device"))
    assert printed_nowhere(*argv, closed=True) == (2, NOWHERE.format("Broken pipe"))


def test_a_result_that_nobody_reads_is_a_failure_and_no_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Gone(BrokenPipeError(errno.EPIPE, "Broken pipe"), terminal=False)
    monkeypatch.setattr(sys, "stdout", gone)
    assert main(["plan", "demo"]) == 2
    assert capsys.readouterr().err == NOWHERE.format("Broken pipe")


def test_no_file_takes_the_place_of_a_stream_that_was_closed() -> None:
    script = (
        "import os\nfrom lowmem_gblm.cli.main import main\n"
        "assert main(['nonsense']) == 2\n"
        "print(os.open(os.devnull, os.O_RDONLY))"
    )
    shell = ["bash", "-c", 'exec "$@" <&- 2>&-', "bash", sys.executable, "-c", script]
    answer = subprocess.run(shell, stdout=subprocess.PIPE, text=True)
    assert int(answer.stdout.split()[-1]) >= 3


@needs_full
@pytest.mark.parametrize(("argv", "code"), [(["nonsense"], 2), (["verify", "nowhere"], 3)])
def test_an_exit_code_is_the_same_though_stderr_is_full(argv: list[str], code: int) -> None:
    with open(FULL, "w") as full:
        process = command(*argv, out=subprocess.PIPE, err=full)
        assert process.communicate()[0] == ""
    assert process.returncode == code
