"""Ctrl-C and SIGTERM: the first stops a run before its next sample, the second ends the process.

A run looks at one flag before every sample and every matrix, so no library, no write and no
clean-up is interrupted in the middle. Outside of a run, where models are opened and libraries
imported, the first signal raises at once, as Python itself would.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from lowmem_gblm.errors import INTERRUPTED

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_STOPPING = b"lowmem-gblm: interrupted: stopping after the current sample. Once more ends at once\n"
# The signals, and what Python does with each of them.
_DEFAULTS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class StopRequested(KeyboardInterrupt):
    """The exception of SIGINT and SIGTERM.

    A `KeyboardInterrupt` itself that passes through `exec` makes Python end the process by a signal
    instead of an exit code; an instance of a subclass does not.
    """


class StopFlag:
    """A request to stop a run: any thread makes it, the run raises it before its next sample."""

    def __init__(self) -> None:
        self._requested: list[BaseException] = []

    def request(self, error: BaseException) -> None:
        """Request a stop by raising `error`; of several requests the first one counts."""
        # Appending needs no lock, which a signal handler would wait for in vain.
        self._requested.append(error)

    def check(self) -> None:
        """Raise the requested error, if a stop was requested."""
        if self._requested:
            raise self._requested[0]


class _Handler:
    """A handler of both signals; `run` is the flag of the run under way."""

    def __init__(self, again: Callable[[int], None]) -> None:
        self.run: StopFlag | None = None
        self.came = 0
        self._again = again

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came += 1
        if self.came > 1:
            self._again(number)
        elif self.run is None:
            raise StopRequested
        else:
            self.run.request(StopRequested())
            _write(_STOPPING)


@contextmanager
def raise_on_signals(last_words: str, *, ends: bool) -> Iterator[None]:
    """Run the body; the first SIGINT or SIGTERM raises `StopRequested`, the second ends all.

    A signal is never lost: if a library drops or replaces the exception, it is raised again at the
    end. A signal that was ignored before stays ignored. Only the main thread is concerned.

    Args:
        last_words: Text that the second signal writes to stderr.
        ends: Whether the process ends afterwards: signals are ignored from then on, for the sake of
            its exit code. Otherwise the former handlers are put back.
    """
    if not _is_main_thread():
        yield
        return
    handler = _Handler(partial(_end, os.fsencode(last_words)))
    former = {number: signal.getsignal(number) for number in _DEFAULTS}
    # None stands for a handler that Python does not know and could not put back.
    former = {number: how for number, how in former.items() if how not in (signal.SIG_IGN, None)}
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = partial(_end_if_dropped, handler, hook)
        for number in former:
            signal.signal(number, handler)
        yield
    except Exception as error:
        if handler.came:
            raise StopRequested from error
        raise
    finally:
        sys.unraisablehook = hook
        for number, how in former.items():
            signal.signal(number, signal.SIG_IGN if ends else how)
    if handler.came:
        raise StopRequested


@contextmanager
def stop_on_signals(stop: StopFlag) -> Iterator[None]:
    """Run the body; the first SIGINT or SIGTERM requests a stop and says so on stderr.

    Within `raise_on_signals` the second one ends the process. Elsewhere, as in a notebook, handlers
    that are not Python's own are left alone, and the second signal does what it did before. A
    signal that no check has seen is raised at the end. Only the main thread is concerned.
    """
    if not _is_main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in _DEFAULTS}
    replaced: dict[int, Any] = {}
    handler = next((how for how in found.values() if isinstance(how, _Handler)), None)
    if handler is None:
        replaced = {number: how for number, how in found.items() if how == _DEFAULTS[number]}
        handler = _Handler(partial(_do_as_before, replaced))
    outer, handler.run = handler.run, stop
    if handler.came:
        stop.request(StopRequested())
    try:
        for number in replaced:
            signal.signal(number, handler)
        yield
    finally:
        for number, how in replaced.items():
            signal.signal(number, how)
        handler.run = outer
    if handler.came:
        raise StopRequested


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(last_words: bytes, number: int) -> None:
    _write(last_words)
    os._exit(INTERRUPTED)


def _do_as_before(former: dict[int, Any], number: int) -> None:
    signal.signal(number, former[number])
    signal.raise_signal(number)


def _end_if_dropped(
    handler: _Handler, hook: Callable[[UnraisableHookArgs], object], dropped: UnraisableHookArgs
) -> None:
    """End the process if Python drops a `StopRequested`, as it does in a `__del__`."""
    if issubclass(dropped.exc_type, StopRequested):
        handler(signal.SIGINT, None)
    hook(dropped)


def _write(line: bytes) -> None:
    """Write to stderr, which may be gone."""
    with suppress(OSError):
        os.write(2, b"\n" * os.isatty(2) + line)
