"""What a signal does: the first one raises, once, and none is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from interruptions import SIGNALS, both_at_once

from lowmem_gblm.runtime.signals import (
    check_interrupted,
    clear_up,
    interruptible,
    interruption_first,
)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A process in the background is born deaf to Ctrl-C."""
    former = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, how in former.items():
        signal.signal(number, how)


def test_the_first_of_two_interruptions_raises_alone() -> None:
    unwound: list[int] = []
    with interruptible(ends=False):
        try:
            try:
                both_at_once()
            finally:
                unwound.append(1)
                unwound.append(2)
        except KeyboardInterrupt:
            unwound.append(3)
    assert unwound == [1, 2, 3]


def dropped(interrupt: Callable[[], None]) -> None:
    """What is raised in here, Python drops."""

    class Finalized:
        def __del__(self) -> None:
            interrupt()

    Finalized()


@pytest.mark.parametrize("number", SIGNALS)
def test_no_interruption_is_lost_and_none_is_interrupted(number: signal.Signals) -> None:
    """Python drops what is raised while an object is being finalized."""

    def interrupt() -> None:
        signal.raise_signal(number)

    former = signal.getsignal(number), sys.unraisablehook
    with interruptible(ends=False):
        check_interrupted()
        for _ in range(2):
            dropped(interrupt)
            with pytest.raises(KeyboardInterrupt):
                check_interrupted()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            check_interrupted()
        clear_up()
        interrupt()
        check_interrupted()
    assert (signal.getsignal(number), sys.unraisablehook) == former
    check_interrupted()


@pytest.mark.parametrize("number", SIGNALS)
def test_what_python_drops_is_raised_again(number: signal.Signals) -> None:
    former = signal.getsignal(signal.SIGALRM)
    with interruptible(ends=False):
        dropped(lambda: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        signal.raise_signal(number)
    assert signal.getsignal(signal.SIGALRM) == former
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


ENDLESS = """
import os, signal, sys, time
from lowmem_gblm.runtime.signals import clear_up, interruptible
with interruptible(ends=True):
    try:
        exec("signal.raise_signal(signal.SIGINT)")
    except KeyboardInterrupt:
        {finishing}
        clear_up()
sys.exit(130)
"""


@pytest.mark.parametrize(
    ("finishing", "told"),
    [
        ("pass", 0),
        ("signal.raise_signal(signal.SIGINT)", 1),
        ("os.close(2); signal.raise_signal(signal.SIGINT)", 0),
        ("[signal.raise_signal(number) for number in (15, 2)]; time.sleep(60)", 1),
        ("clear_up(); [signal.raise_signal(number) for number in (15, 2, 2)]", 0),
    ],
)
def test_the_second_signal_is_answered_and_the_third_obeyed(finishing: str, told: int) -> None:
    """All of them with the exit code: a process that dies of a signal has not been told."""
    program = [sys.executable, "-c", ENDLESS.format(finishing=finishing)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (130, "")
    patience = "lowmem-gblm: interrupted: what is under way is being finished. Once more ends it at"
    assert ended.stderr == f"{patience} once\n" * told


AFTERWARDS = """
import atexit, os, signal
from lowmem_gblm.runtime.signals import interruptible
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 2)
late = Late()
atexit.register(signal.raise_signal, signal.SIGTERM)
with interruptible(ends=True):
    pass
"""


def test_no_signal_ends_a_process_that_is_ending() -> None:
    program = [sys.executable, "-c", AFTERWARDS]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_signal_after_the_end_does_nothing() -> None:
    with interruptible(ends=True):
        pass
    for number in SIGNALS:
        signal.raise_signal(number)


def test_what_else_python_drops_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    def fail() -> None:
        raise ValueError

    with interruptible(ends=False):
        dropped(fail)
        check_interrupted()
    assert told == [ValueError]


def test_an_error_that_follows_an_interruption_is_one() -> None:
    with interruptible(ends=False):
        with pytest.raises(ValueError, match="alone"), interruption_first():
            raise ValueError("alone")
        dropped(lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), interruption_first():
            raise ValueError("after it")
