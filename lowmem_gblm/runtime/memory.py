"""The memory of this process as the operating system counts it: now, its peak, its limits."""

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from lowmem_gblm.runtime.posix import resource

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_KEPT_AT_END_BYTES = 1 << 30
_SMALL_BOUNDARY_BYTES = 1 << 20
_FROM_SYSTEM_SMALL_BYTES = 1 << 16
_FROM_SYSTEM_BYTES = 1 << 25


def host_peak_bytes() -> int:
    """Return the largest resident set since the process began, or since `reset_host_peak`."""
    status = _STATUS.read_text() if _STATUS.exists() else ""
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    if match:
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_host_peak() -> None:
    """Reset the peak of host memory to that of a new run, where the system can."""
    with suppress(OSError):
        _CLEAR.write_text("5")


def settle_allocator(boundary_bytes: int = 0) -> None:
    """Fix the size from which glibc takes tensors from the system and returns them at once.

    By default glibc raises that size as it goes, and keeps pieces in between. Tensors of large
    models are better kept for reuse, which saves a page fault for every 4 KiB; with small ones, the
    kept pieces would be more than the memory in use. `boundary_bytes` is the size of the hidden
    states of one sample; 0 while it is not known, as tensors built before then must not leave holes
    either.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        small = boundary_bytes < _SMALL_BOUNDARY_BYTES
        set_option(_M_MMAP_THRESHOLD, _FROM_SYSTEM_SMALL_BYTES if small else _FROM_SYSTEM_BYTES)
        # Free memory at the end of the heap stays until `give_back_freed`.
        set_option(_M_TRIM_THRESHOLD, _KEPT_AT_END_BYTES)


def give_back_freed() -> None:
    """Return freed memory to the system; other allocators than glibc are left alone.

    glibc keeps freed memory, in ever more pieces: memory would grow with the number of blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def host_resident_bytes() -> int:
    """Return the resident set now, in bytes."""
    return int(psutil.Process().memory_info().rss)
