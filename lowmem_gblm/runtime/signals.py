"""Ctrl-C and SIGTERM: an interruption is not interrupted, and none is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from lowmem_gblm.errors import INTERRUPTED

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


_AGAIN_S = 0.01
_PATIENCE = (
    b"lowmem-gblm: interrupted: what is under way is being finished. Once more ends it at once\n"
)


class StopRequested(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    Of a `KeyboardInterrupt` itself that passes through `exec`, Python remembers that it came, and
    ends the process by a signal instead of its exit code.
    """


class _State:
    """Of the process.

    Attributes:
        came: How many signals.
        lost: Whether Python has dropped what the first one raised.
        clearing: Whether all is being put in order for it.
        ends: Whether the process ends afterwards.
    """

    came = 0
    lost = False
    clearing = False
    ends = False


@contextmanager
def interruptible(*, ends: bool) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM raises `StopRequested`, until `clear_up` is called.

    A later one raises only if the first was lost, so that what unwinds is left to unwind. Where
    the process ends, the second says so, and the third ends it as a crash would.
    What was ignored before stays ignored.

    Args:
        ends: Whether the process ends afterwards: signals do nothing then. Otherwise what they
            did before is put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: _interrupt, signal.SIGTERM: _interrupt, signal.SIGALRM: _raise_again}
    former = {number: signal.getsignal(number) for number in handlers}
    former = {number: how for number, how in former.items() if how is not signal.SIG_IGN}
    hook = sys.unraisablehook
    _forget()
    _State.ends = ends
    try:
        sys.unraisablehook = _noticing(hook)
        for number in former:
            signal.signal(number, handlers[number])
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, how in former.items():
            # Only this outlasts the end of the interpreter.
            signal.signal(number, signal.SIG_IGN if ends else how)
        _forget()


def clear_up() -> None:
    """From now on signals do nothing: the step under way becomes durable, a person is told."""
    _State.clearing = True


def check_interrupted() -> None:
    """Raise `StopRequested` if a signal has come and nobody has taken notice.

    Python drops what is raised while an object is being finalized. It is raised again a moment
    later; by this a step that is about to be counted is not.
    """
    if _State.came and not _State.clearing:
        _State.lost = False
        raise StopRequested


@contextmanager
def interruption_first() -> Iterator[None]:
    """Within, an error that follows an interruption is one.

    Where an interruption meets a library between two of its steps, what unwinds there may fail.
    """
    try:
        yield
    except Exception as error:
        if _State.came:
            raise StopRequested from error
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _State.clearing:
        return
    if _State.lost or not _State.came:
        _State.came, _State.lost = 1, False
        raise StopRequested
    _State.came += 1
    if _State.ends and _State.came > 2:
        os._exit(INTERRUPTED)
    # The terminal may be gone; what unwinds is not to meet that.
    with suppress(OSError):
        if _State.ends:
            os.write(2, b"\n" * os.isatty(2) + _PATIENCE)


def _noticing(hook: Callable[[UnraisableHookArgs], object]) -> Callable[[UnraisableHookArgs], None]:
    """Of what Python drops, an interruption is raised anew, and the rest left to `hook`."""

    def notice(dropped: UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, StopRequested):
            hook(dropped)
            return
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        # Last: in here it would be dropped again.
        _State.lost = True

    return notice


def _raise_again(number: int, frame: FrameType | None) -> None:
    """Comes every moment, until somebody has taken notice."""
    if _State.lost or _State.clearing:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if _State.lost:
        _interrupt(number, frame)


def _forget() -> None:
    _State.came, _State.lost, _State.clearing, _State.ends = 0, False, False, False
