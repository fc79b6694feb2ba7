"""Ctrl-C and SIGTERM: the first one counts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def one_interruption(*, ends: bool) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM raises `KeyboardInterrupt`, and later ones do nothing.

    So whoever presses Ctrl-C twice does not interrupt what the first one has begun: the step under
    way becomes durable, and a person is told how to go on. What was ignored before stays ignored.

    Args:
        ends: Whether the process ends afterwards, so that nothing has to be put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: how for number, how in former.items() if how is not signal.SIG_IGN}

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for one in former:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in former:
            signal.signal(number, interrupt)
        yield
    finally:
        if not ends:
            for number, how in former.items():
                signal.signal(number, how)
