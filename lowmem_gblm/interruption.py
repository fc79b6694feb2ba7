"""Ctrl-C and SIGTERM: an interruption is not interrupted, and none is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _State:
    """Of the process: whether a signal has come, and whether all is being put in order for it."""

    came = False
    clearing = False


@contextmanager
def interruptible(*, ends: bool) -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise `KeyboardInterrupt`, until `clear_up` is called.

    What was ignored before stays ignored.

    Args:
        ends: Whether the process ends afterwards, so that nothing has to be put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: how for number, how in former.items() if how is not signal.SIG_IGN}
    _State.came = _State.clearing = False
    try:
        for number in former:
            signal.signal(number, _interrupt)
        yield
    finally:
        if not ends:
            for number, how in former.items():
                signal.signal(number, how)
            _State.came = _State.clearing = False


def clear_up() -> None:
    """From now on signals do nothing: the step under way becomes durable, a person is told."""
    _State.clearing = True


def check_interrupted() -> None:
    """Raise `KeyboardInterrupt` if a signal has come and was lost.

    Python drops what is raised while an object is being finalized.
    """
    if _State.came and not _State.clearing:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _State.clearing:
        _State.came = True
        raise KeyboardInterrupt
