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
_SMALL_BOUNDARY_BYTES = 1 << 20
_FROM_SYSTEM_SMALL_BYTES = 1 << 16
_FROM_SYSTEM_BYTES = 1 << 25


def host_peak_bytes() -> int:
    """Largest resident set since the process began, or since `reset_host_peak`."""
    if _STATUS.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if match:
            return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_peak_bytes(device: torch.device) -> int:
    """Largest memory held on a GPU since `reset_gpu_peak`; 0 for a CPU."""
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


def settle_allocator(boundary_bytes: int = 0) -> None:
    """Fix the size from which glibc takes tensors from the system and gives them back at once.

    Left alone it raises that size as it goes, and keeps pieces in between. Tensors of large models
    are better kept for reuse, which saves a page fault for every 4 KiB; for small ones, what lies
    around would be more than what is in use.

    Args:
        boundary_bytes: Size of the hidden states of one sample; 0 while it is not known: what is
            built before then must not leave holes for tensors either.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        small = boundary_bytes < _SMALL_BOUNDARY_BYTES
        set_option(_M_MMAP_THRESHOLD, _FROM_SYSTEM_SMALL_BYTES if small else _FROM_SYSTEM_BYTES)


def give_back_freed() -> None:
    """Return what was freed to the system.

    glibc keeps it, in ever more pieces: without this, memory grows with the number of blocks.
    Other allocators are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def host_resident_bytes() -> int:
    """Resident set now."""
    return int(psutil.Process().memory_info().rss)
