"""What a signal does within a run and outside of one: none is lost, the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import lowmem_gblm
from lowmem_gblm.runtime.progress import Tick
from lowmem_gblm.runtime.signals import StopFlag, StopRequested, raise_on_signals, stop_on_signals
from support.crashes import SIGNALS

STOPPING = "lowmem-gblm: interrupted: stopping after the current sample. Once more ends at once\n"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Give each test Python's own handlers: a process in the background ignores SIGINT."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    former = {number: signal.signal(number, how) for number, how in own.items()}
    yield
    assert {number: signal.getsignal(number) for number in own} == own
    for number, how in former.items():
        signal.signal(number, how)


def test_of_several_requests_the_first_is_raised() -> None:
    stop = StopFlag()
    stop.check()
    threads = [threading.Thread(target=stop.request, args=(ValueError(n),)) for n in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    for _ in range(2):
        with pytest.raises(ValueError, match="0"):
            stop.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_within_a_run_a_signal_is_raised_by_the_next_check(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = StopFlag()
    with suppress(StopRequested), stop_on_signals(stop):
        signal.raise_signal(number)
        assert capfd.readouterr().err == STOPPING
        with pytest.raises(StopRequested):
            stop.check()


def test_a_signal_that_no_check_has_met_is_raised_at_the_end() -> None:
    with pytest.raises(StopRequested), stop_on_signals(StopFlag()):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_does_what_it_did_before_where_no_command_runs() -> None:
    """So that it does not end the process of a notebook."""
    with suppress(StopRequested), stop_on_signals(StopFlag()):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
        assert caught.type is KeyboardInterrupt


@pytest.mark.parametrize("how", [signal.SIG_IGN, lambda number, frame: None])
def test_handlers_of_others_are_left_alone(how: signal.Handlers) -> None:
    former = signal.signal(signal.SIGINT, how)
    with stop_on_signals(StopFlag()):
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is how
    signal.signal(signal.SIGINT, former)


def test_in_another_thread_nothing_is_changed() -> None:
    seen: list[object] = []

    def work() -> None:
        with raise_on_signals("", ends=True), stop_on_signals(StopFlag()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_a_run_a_signal_is_raised_at_once(number: signal.Signals) -> None:
    with suppress(StopRequested), raise_on_signals("", ends=False):
        with stop_on_signals(StopFlag()):
            pass
        with pytest.raises(StopRequested):
            signal.raise_signal(number)


def swallowed(error: Exception | None = None) -> None:
    """Do what a library may do when a signal meets it."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    if error is not None:
        raise error


def test_what_a_library_swallows_is_raised_at_the_end_or_in_the_next_run() -> None:
    with pytest.raises(StopRequested), raise_on_signals("", ends=False):
        swallowed()
    stop = StopFlag()
    with suppress(StopRequested), raise_on_signals("", ends=False):
        swallowed()
        with stop_on_signals(stop), pytest.raises(StopRequested):
            stop.check()


def test_an_error_that_follows_a_signal_is_one() -> None:
    with pytest.raises(ValueError, match="alone"), raise_on_signals("", ends=False):
        raise ValueError("alone")
    with pytest.raises(StopRequested), raise_on_signals("", ends=False):
        swallowed(ValueError("trying to pop from empty mode stack"))


def test_what_else_python_drops_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    class Finalized:
        def __del__(self) -> None:
            raise ValueError

    with raise_on_signals("", ends=False):
        Finalized()
    assert told == [ValueError]


PRELUDE = """
import atexit, os, signal, sys
from lowmem_gblm.runtime.signals import StopFlag, StopRequested, raise_on_signals, stop_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(*numbers):
    for number in numbers:
        signal.raise_signal(number)
class Late:
    def __del__(self, interrupt=interrupt):
        interrupt(2)
"""


def run(script: str) -> tuple[int, str]:
    """Run a script in a process of its own; returns its exit code and what it wrote to stderr."""
    program = [sys.executable, "-c", PRELUDE + script]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=50)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


COMMAND = """
with raise_on_signals("the end\\n", ends=True):
    {}
sys.exit(99)
"""


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exec('try: interrupt(2)\\nexcept: interrupt(15)')", "the end\n"),
        ("with stop_on_signals(StopFlag()): interrupt(15, 2)", STOPPING + "the end\n"),
        ("Late()", "the end\n"),
        ("os.close(2); exec('try: interrupt(2)\\nexcept: interrupt(2)')", ""),
    ],
    ids=["outside", "in a run", "dropped", "nowhere to write"],
)
def test_the_second_signal_ends_a_command_and_so_does_one_that_python_drops(
    script: str, error: str
) -> None:
    assert run(COMMAND.format(script)) == (130, error)


def test_an_interruption_that_passes_through_exec_keeps_the_exit_code() -> None:
    """Of a plain `KeyboardInterrupt` Python would remember it, and end by the signal."""
    script = "try:\n with raise_on_signals('', ends=True): exec('interrupt(2)')\n"
    assert run(f"{script}except KeyboardInterrupt: sys.exit(130)") == (130, "")


def test_no_signal_ends_a_process_that_is_ending() -> None:
    script = "late = Late(); atexit.register(interrupt, 2, 15)\n"
    assert run(script + "with raise_on_signals('', ends=True): pass") == (0, "")


@pytest.mark.parametrize("stage", ["embed", "dense", "head"])
def test_an_evaluation_is_stopped_and_leaves_what_is_done(
    stage: str, small: Path, text_file: Path, tmp_path: Path
) -> None:
    ticks: list[Tick] = []

    def listener(tick: Tick) -> None:
        ticks.append(tick)
        if tick.stage == stage:
            os.kill(os.getpid(), signal.SIGINT)

    asked = {"text": str(text_file), "seqlen": 16, "windows": 3, "work_dir": tmp_path}
    with pytest.raises(StopRequested):
        lowmem_gblm.evaluate(small, listener=listener, **asked)
    assert [tick.step for tick in ticks if tick.stage == stage] == [1]
    assert len(list(tmp_path.glob("*/journal/*"))) == {"embed": 0, "dense": 2, "head": 3}[stage]
