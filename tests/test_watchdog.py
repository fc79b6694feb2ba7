"""The watch over host memory: what stops a run, where, with which words, and what does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.runtime import watchdog
from lowmem_gblm.runtime.machine import HostMemory
from lowmem_gblm.runtime.memory import CUDA_CONTEXT_BYTES, limit_gpu
from lowmem_gblm.runtime.watchdog import HostWatch

MIB, GIB = 1 << 20, 1 << 30
PLENTY = HostMemory(total_bytes=16 * GIB, available_bytes=8 * GIB)
SHORT = HostMemory(total_bytes=16 * GIB, available_bytes=100 * MIB)

PRELUDE = """
import os, signal, threading, time
from lowmem_gblm.runtime import watchdog
from lowmem_gblm.errors import BudgetError
from lowmem_gblm.runtime.memory import host_resident_bytes
from lowmem_gblm.runtime.watchdog import HostWatch

MIB = 1 << 20
limit = host_resident_bytes() + 64 * MIB

def take(watch=None, mib=160):
    taken = []
    for _ in range(mib // 4):
        taken.append(bytearray(os.urandom(MIB)) * 4)
        time.sleep(0.01)
        if watch is not None:
            watch.check()
    return taken
"""


def run(script: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


STOPPED = """
try:
    with HostWatch(limit, planned_bytes=MIB << 9):
        take()
    print("not stopped")
except BudgetError as error:
    print(error)
    print("MiB above:", (host_resident_bytes() - limit) >> 20)
    print(signal.getsignal(watchdog._SIGNAL).name)
"""


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN)"])
def test_a_run_that_takes_too_much_is_stopped(before: str) -> None:
    sentence, above, handler = run(before + STOPPED).splitlines()
    assert sentence.startswith("this process has taken 0.")
    assert "may be used: stopped before the system runs short. The plan was 0.50 GiB." in sentence
    assert int(above.split()[-1]) < 48
    assert handler == "SIG_DFL"


def test_a_run_that_ended_is_not_disturbed() -> None:
    script = """
with HostWatch(limit):
    pass
taken = take(mib=100)
time.sleep(0.2)
print(threading.active_count())
"""
    assert run(script) == "1\n"


def test_from_another_thread_only_the_check_stops() -> None:
    script = """
def work(check):
    try:
        with HostWatch(limit) as watch:
            taken = take(watch if check else None, mib=100)
        print("ended")
    except BudgetError:
        print("stopped")

for check in (False, True):
    thread = threading.Thread(target=work, args=(check,))
    thread.start()
    thread.join()
"""
    assert run(script) == "ended\nstopped\n"


def test_what_a_library_swallows_is_raised_again_by_the_check() -> None:
    script = """
try:
    with HostWatch(limit) as watch:
        try:
            taken = take()
        except Exception:
            print("swallowed")
        watch.check()
except BudgetError as error:
    print(str(error) == watch.reason)
"""
    assert run(script) == "swallowed\nTrue\n"


def spin(seconds: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)


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
    with pytest.raises(BudgetError, match=sentence), HostWatch(None, interval_s=0.001):
        spin()


@pytest.mark.parametrize(
    ("memory", "resident_bytes"),
    [(PLENTY, 8 * GIB), (SHORT, 1 * GIB)],
    ids=["there is enough", "others took it"],
)
def test_a_run_that_does_no_harm_goes_on(machine, memory, resident_bytes) -> None:
    machine(memory, resident_bytes)
    with HostWatch(9 * GIB, interval_s=0.001) as watch:
        spin(0.05)
    watch.check()


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


def test_a_reason_found_while_a_run_ends_comes_too_late(machine) -> None:
    machine(PLENTY, 2 * GIB)
    watch = HostWatch(GIB, interval_s=60)
    with watch:
        pass
    watch.reason = watch._look(at_system=False)
    assert watch.reason is not None
    watch._interrupted(watchdog._SIGNAL, None)


def test_a_handler_is_called_meanwhile_and_put_back() -> None:
    calls: list[int] = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)

    former = signal.signal(watchdog._SIGNAL, handler)
    try:
        with HostWatch(None):
            signal.raise_signal(watchdog._SIGNAL)
        assert calls == [watchdog._SIGNAL]
        assert signal.getsignal(watchdog._SIGNAL) is handler
    finally:
        signal.signal(watchdog._SIGNAL, former)


def test_the_outer_of_two_watches_stops_the_run(machine) -> None:
    machine(PLENTY, 2 * GIB)
    former = signal.getsignal(watchdog._SIGNAL)
    with (
        pytest.raises(BudgetError, match=r"1\.00 GiB may be used"),
        HostWatch(GIB, interval_s=0.02),
        HostWatch(3 * GIB, interval_s=0.001),
    ):
        spin()
    assert signal.getsignal(watchdog._SIGNAL) == former


@pytest.mark.parametrize("attempt", range(20))
def test_a_run_of_any_length_ends_or_is_stopped_and_leaves_nothing(machine, attempt: int) -> None:
    machine(PLENTY, 2 * GIB)
    former = signal.getsignal(watchdog._SIGNAL)
    try:
        with HostWatch(GIB, interval_s=0.002):
            spin(0.0005 * attempt)
    except BudgetError:
        pass
    spin(0.005)
    assert signal.getsignal(watchdog._SIGNAL) == former
    assert "host-watch" not in {thread.name for thread in threading.enumerate()}


class Properties:
    """Of a GPU of 24 GiB."""

    total_memory = 24 * GIB


def test_a_gpu_is_limited_context_included(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: calls.append(fraction * Properties.total_memory),
    )
    gpu = torch.device("cuda")
    limit_gpu(gpu, 12 * GIB)
    limit_gpu(gpu, 100 * GIB)
    assert calls == [12 * GIB - CUDA_CONTEXT_BYTES, 24 * GIB]
    with pytest.raises(BudgetError, match=r"0\.25 GiB of GPU .* CUDA itself takes about 0\.50 GiB"):
        limit_gpu(gpu, GIB // 4)


def test_a_cpu_has_no_such_limit() -> None:
    limit_gpu(torch.device("cpu"), 1)
