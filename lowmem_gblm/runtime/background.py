"""One piece of work beside the rest, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def worker(name: str) -> ThreadPoolExecutor:
    """Return a thread for pieces of work."""
    return ThreadPoolExecutor(1, name)


class SerialWorker:
    """Does one thing at a time in its thread; the next one begins when the last is done.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = worker(name)
        self._last: Future[None] | None = None

    def begin(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Wait for the last piece of work, then begin this one; returns what tells when it is done.

        Raises:
            Exception: What the last one raised.
        """
        self.settle()
        self._last = self._thread.submit(work, *arguments)
        return self._last

    def settle(self) -> None:
        """Wait until the last piece of work is done. Several threads may wait.

        Raises:
            Exception: What it raised.
        """
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Let the work under way end."""
        self._thread.shutdown()
