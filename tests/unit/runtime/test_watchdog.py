"""The watch over host memory: what stops a run, where, with which words, and what does not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.runtime import watchdog
from lowmem_gblm.runtime.machine import HostMemory
from lowmem_gblm.runtime.signals import StopFlag
from lowmem_gblm.runtime.watchdog import HostWatch

MIB, GIB = 1 << 20, 1 << 30
PLENTY = HostMemory(total_bytes=16 * GIB, available_bytes=8 * GIB)
SHORT = HostMemory(total_bytes=16 * GIB, available_bytes=100 * MIB)

STOPPED = """
import os, time
from lowmem_gblm.errors import BudgetError
from lowmem_gblm.runtime.memory import host_resident_bytes
from lowmem_gblm.runtime.signals import StopFlag
from lowmem_gblm.runtime.signals import StopFlag
from lowmem_gblm.runtime.watchdog import HostWatch

MIB = 1 << 20
limit, stop, taken = host_resident_bytes() + 64 * MIB, StopFlag(), []
try:
    with HostWatch(limit, stop, planned_bytes=MIB << 9):
        for _ in range(40):
            taken.append(bytearray(os.urandom(MIB)) * 4)
            time.sleep(0.01)
            stop.check()
except BudgetError as error:
    print(error)
    print("MiB above:", (host_resident_bytes() - limit) >> 20)
"""


def test_a_run_that_takes_too_much_is_stopped() -> None:
    program = [sys.executable, "-c", STOPPED]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    sentence, above = done.stdout.splitlines()
    assert sentence.startswith("this process has taken 0.")
    assert "may be used: stopped before the system runs short. The plan was 0.50 GiB." in sentence
    assert int(above.split()[-1]) < 48


def spin(stop: StopFlag, seconds: float = 50) -> None:
    """Do what a run does, for so long at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)
        stop.check()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets what the watch sees of the machine and of this process."""

    def see(memory: HostMemory, resident_bytes: int) -> None:
        monkeypatch.setattr(watchdog, "host_memory", lambda: memory)
        monkeypatch.setattr(watchdog, "host_resident_bytes", lambda: resident_bytes)

    return see


def test_a_run_is_stopped_when_the_system_runs_short(machine) -> None:
    machine(SHORT, 8 * GIB)
    sentence = (
        r"^0\.10 GiB of 16\.00 GiB of host memory are left, and this process has taken 8\.00 GiB: "
        r"stopped before the system swaps or kills\. Close other programs, or give a smaller "
        r"--cpu-memory$"
    )
    stop = StopFlag()
    with pytest.raises(BudgetError, match=sentence), HostWatch(None, stop, interval_s=0.001):
        spin(stop)


@pytest.mark.parametrize(
    ("memory", "resident_bytes"),
    [(PLENTY, 8 * GIB), (SHORT, 1 * GIB)],
    ids=["there is enough", "others took it"],
)
def test_a_run_that_does_no_harm_goes_on(machine, memory, resident_bytes) -> None:
    machine(memory, resident_bytes)
    stop = StopFlag()
    with HostWatch(9 * GIB, stop, interval_s=0.001):
        spin(stop, 0.05)
    stop.check()


@pytest.mark.parametrize(
    ("total_bytes", "available_bytes", "short"),
    [
        (64 * GIB, 256 * MIB, False),
        (64 * GIB, 255 * MIB, True),
        (GIB, 21 * MIB, False),
        (GIB, 20 * MIB, True),
    ],
)
def test_where_the_floor_lies(total_bytes: int, available_bytes: int, short: bool) -> None:
    memory = HostMemory(total_bytes=total_bytes, available_bytes=available_bytes)
    assert watchdog._runs_short(memory, total_bytes // 2) is short


def test_a_run_that_has_ended_is_watched_no_more(machine) -> None:
    machine(PLENTY, 2 * GIB)
    stop = StopFlag()
    with HostWatch(GIB, stop, interval_s=60):
        assert "host-watch" in {thread.name for thread in threading.enumerate()}
    stop.check()
    assert "host-watch" not in {thread.name for thread in threading.enumerate()}
