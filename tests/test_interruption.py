"""What a signal does: the first one raises, once, and none is lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from interruptions import SIGNALS, both_at_once

from lowmem_gblm.interruption import (
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
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            check_interrupted()
        clear_up()
        interrupt()
        check_interrupted()
    assert (signal.getsignal(number), sys.unraisablehook) == former
    check_interrupted()


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
