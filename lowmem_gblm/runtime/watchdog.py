"""A watch that stops a run before its memory, or that of the system, runs out.

If a plan is wrong, the system would swap until nothing answers, or kill a process; an error with a
sentence is better.
"""

import threading
from dataclasses import dataclass
from typing import Self

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.runtime.machine import HostMemory, host_memory
from lowmem_gblm.runtime.memory import host_resident_bytes
from lowmem_gblm.runtime.signals import StopFlag

# Asking about the system takes ten times as long as asking about this process.
_SYSTEM_EVERY = 4
_FLOOR = 0.02
_FLOOR_BYTES = 256 << 20
_SIZEABLE = 0.25


@dataclass
class HostWatch:
    """A thread that requests a stop, a `BudgetError`, once host memory gets short.

    Without `limit_bytes`, the most resident memory of this process, only the system is watched.
    """

    limit_bytes: int | None
    stop: StopFlag
    planned_bytes: int | None = None
    interval_s: float = 0.05

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(self.interval_s):
            reason = self._look(at_system=looks % _SYSTEM_EVERY == 0)
            if reason is not None:
                self.stop.request(BudgetError(reason))
                return
            looks += 1

    def _look(self, *, at_system: bool) -> str | None:
        """Return why the run must stop; None if it need not."""
        resident = host_resident_bytes()
        if self.limit_bytes is not None and resident > self.limit_bytes:
            return (
                f"this process has taken {_gib(resident)} of host memory, "
                f"{_gib(self.limit_bytes)} may be used: stopped before the system runs short. "
                f"{self._plan()}Give a larger --cpu-memory, or try a smaller --seqlen"
            )
        memory = host_memory() if at_system else None
        if memory is not None and _runs_short(memory, resident):
            return (
                f"{_gib(memory.available_bytes)} of {_gib(memory.total_bytes)} of host memory are "
                f"left, and this process has taken {_gib(resident)}: stopped before the system "
                f"swaps or kills. {self._plan()}Close other programs, or give a smaller "
                f"--cpu-memory"
            )
        return None

    def _plan(self) -> str:
        return "" if self.planned_bytes is None else f"The plan was {_gib(self.planned_bytes)}. "


def _runs_short(memory: HostMemory, resident_bytes: int) -> bool:
    """Return whether next to nothing is left, and this process holds a sizeable part of it."""
    floor = min(_FLOOR_BYTES, _FLOOR * memory.total_bytes)
    used = memory.total_bytes - memory.available_bytes
    return memory.available_bytes < floor and resident_bytes >= _SIZEABLE * used


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
