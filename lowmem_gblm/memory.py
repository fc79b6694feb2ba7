"""How much memory this process has used at most, as the operating system counts it."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_M_MMAP_THRESHOLD = -3
_RETURNED_FROM_BYTES = 65536


def host_peak_bytes() -> int:
    """Largest resident set since the process began, or since `reset_host_peak`."""
    if _STATUS.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if match:
            return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_peak_bytes(device: torch.device) -> int:
    """Largest memory held on a GPU since `reset_host_peak`; 0 for a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def reset_gpu_peak(device: torch.device) -> None:
    """Begin to count a GPU's memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def reset_host_peak() -> None:
    """Begin to count anew, so that several runs in one process are told apart.

    Only Linux can; elsewhere, and where the kernel forbids it, the peak stays that of the process.
    """
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return


def return_freed_memory_at_once() -> None:
    """Make the allocator hand freed tensors back to the system, for the rest of the process.

    glibc raises the size from which it does so whenever a large block is freed, and then keeps
    ever more pieces: a run over 48 blocks peaked at 1.3 times the memory of one over 6. A fixed
    size keeps memory independent of depth, and predictable. Other allocators are left alone.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _RETURNED_FROM_BYTES)


def host_resident_bytes() -> int:
    """Resident set now."""
    return int(psutil.Process().memory_info().rss)


def host_free_bytes() -> int:
    """What can still be taken before the system swaps."""
    return int(psutil.virtual_memory().available)
