"""One piece of work at a time beside the rest, in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def worker(name: str) -> ThreadPoolExecutor:
    """Return a thread for pieces of work."""
    return ThreadPoolExecutor(1, name)


class SerialWorker:
    """A named thread that does one piece of work at a time; several threads may wait for it."""

    def __init__(self, name: str) -> None:
        self._thread = worker(name)
        self._last: Future[None] | None = None

    def begin(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Begin a piece of work after the last one, raising its exception; return the future."""
        self.settle()
        self._last = self._thread.submit(work, *arguments)
        return self._last

    def settle(self) -> None:
        """Wait until the last piece of work is done, and raise its exception."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait for the current piece of work, and end the thread."""
        self._thread.shutdown()
