"""Stops a run before its memory, or that of the whole system, runs out.

A plan is a prediction. Where it is wrong, the system would swap until nothing answers, or kill
this process or another one: an error with a sentence is better.
"""

from __future__ import annotations

import _thread
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.runtime.machine import HostMemory, host_memory
from lowmem_gblm.runtime.memory import host_resident_bytes

INTERVAL_S = 0.05

# Nobody uses it, and unlike SIGUSR1 and SIGUSR2, which job schedulers send, it does nothing by
# default. It is never sent: only its Python handler is called. None on Windows.
_SIGNAL: Any = getattr(signal, "SIGURG", None)
# Asking about the whole system takes ten times as long as asking about this process.
_SYSTEM_EVERY = 4
_FLOOR = 0.02
_FLOOR_BYTES = 256 << 20
_SIZEABLE = 0.25


class HostWatch:
    """Within, a thread looks every 50 ms, and stops the run when host memory gets short.

    Entered from the main thread it interrupts that thread with a `BudgetError`, as Ctrl-C would,
    but also where Ctrl-C is ignored: at the next step of the interpreter, so not inside a product
    of matrices or a wait for another thread. Entered from any other thread, on Windows, or where a
    library swallows the exception, only `check` stops the run: call it between blocks or samples.

    Args:
        limit_bytes: Most resident memory of this process; None: only the system is watched.
        planned_bytes: What the plan said, for the message; None without a plan.
        interval_s: Time between two looks.

    Attributes:
        reason: Why the run is to stop, once there is a reason.
    """

    def __init__(
        self,
        limit_bytes: int | None,
        *,
        planned_bytes: int | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.reason: str | None = None
        self._limit_bytes = limit_bytes
        self._planned_bytes = planned_bytes
        self._interval_s = interval_s
        self._former: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-watch", daemon=True)

    def __enter__(self) -> Self:
        self._take_over()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # First of all: from here on the handler does nothing, so a finished run stays finished.
        self._over.set()
        self._thread.join()
        self._hand_back()

    def check(self) -> None:
        """Stop here, if there is a reason. Any thread may call this.

        Raises:
            BudgetError: Memory has run short since the run began.
        """
        if self.reason is not None:
            raise BudgetError(self.reason)

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(self._interval_s):
            self.reason = self._look(at_system=looks % _SYSTEM_EVERY == 0)
            if self.reason is not None:
                if self._former is not None:
                    _thread.interrupt_main(_SIGNAL)
                return
            looks += 1

    def _look(self, *, at_system: bool) -> str | None:
        """Why the run must stop, if it must."""
        resident = host_resident_bytes()
        if self._limit_bytes is not None and resident > self._limit_bytes:
            return (
                f"this process has taken {_gib(resident)} of host memory, "
                f"{_gib(self._limit_bytes)} may be used: stopped before the system runs short. "
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
        return "" if self._planned_bytes is None else f"The plan was {_gib(self._planned_bytes)}. "

    def _take_over(self) -> None:
        """Be called for the signal, if Python calls anybody for it and this is where it does."""
        if _SIGNAL is not None and threading.current_thread() is threading.main_thread():
            # None is the handler of a library, which could not be put back.
            self._former = signal.getsignal(_SIGNAL)
            if self._former is not None:
                signal.signal(_SIGNAL, self._interrupted)

    def _hand_back(self) -> None:
        if self._former is not None and signal.getsignal(_SIGNAL) == self._interrupted:
            signal.signal(_SIGNAL, self._former)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and not self._over.is_set():
            # Here, because `__exit__` is not reached where it is itself what is interrupted.
            self._hand_back()
            raise BudgetError(self.reason)
        if callable(self._former):
            self._former(number, frame)


def _runs_short(memory: HostMemory, resident_bytes: int) -> bool:
    """Whether next to nothing is left, and it is this process that could change it."""
    floor = min(_FLOOR_BYTES, _FLOOR * memory.total_bytes)
    used = memory.total_bytes - memory.available_bytes
    return memory.available_bytes < floor and resident_bytes >= _SIZEABLE * used


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
