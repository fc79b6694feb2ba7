"""Ctrl-C and SIGTERM: an interruption is not interrupted, and none is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class _State:
    """Of the process: whether a signal has come, was lost, and all is being put in order for it."""

    came = False
    lost = False
    clearing = False


@contextmanager
def interruptible(*, ends: bool) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM raises `KeyboardInterrupt`, until `clear_up` is called.

    A later one raises only if the first was lost, so that what unwinds is left to unwind.
    What was ignored before stays ignored.

    Args:
        ends: Whether the process ends afterwards: signals do nothing then. Otherwise what they
            did before is put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: how for number, how in former.items() if how is not signal.SIG_IGN}
    hook = sys.unraisablehook
    _forget()
    try:
        sys.unraisablehook = _noticing(hook)
        for number in former:
            signal.signal(number, _interrupt)
        yield
    finally:
        sys.unraisablehook = hook
        if ends:
            clear_up()
        else:
            for number, how in former.items():
                signal.signal(number, how)
            _forget()


def clear_up() -> None:
    """From now on signals do nothing: the step under way becomes durable, a person is told."""
    _State.clearing = True


def check_interrupted() -> None:
    """Raise `KeyboardInterrupt` if a signal has come and was lost.

    Python drops what is raised while an object is being finalized.
    """
    if _State.came and not _State.clearing:
        raise KeyboardInterrupt


@contextmanager
def interruption_first() -> Iterator[None]:
    """Within, an error that follows an interruption is one.

    Where an interruption meets a library between two of its steps, what unwinds there may fail.
    """
    try:
        yield
    except Exception as error:
        if _State.came:
            raise KeyboardInterrupt from error
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _State.clearing or (_State.came and not _State.lost):
        return
    _State.came, _State.lost = True, False
    raise KeyboardInterrupt


def _noticing(hook: Callable[[UnraisableHookArgs], object]) -> Callable[[UnraisableHookArgs], None]:
    """Of what Python drops, an interruption is taken notice of, and the rest left to `hook`."""

    def notice(dropped: UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            _State.lost = True
        else:
            hook(dropped)

    return notice


def _forget() -> None:
    _State.came = _State.lost = _State.clearing = False
