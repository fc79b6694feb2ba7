"""The free memory and disk space of this machine: host memory, GPU memory, disk space."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# Of version 2, and of version 1; a cgroup has the files of one version.
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
_FILE_CACHE = ("inactive_file", "active_file")

_HOST_MARGIN = 0.05
_HOST_MARGIN_BYTES = 512 << 20
_HOST_MARGIN_AT_MOST = 0.25
_DISK_MARGIN = 0.01
_DISK_MARGIN_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Host memory that the system and the limits of this process's cgroups leave.

    Attributes:
        total_bytes: The smallest of the machine's memory and the limits.
        available_bytes: Bytes that can be taken now without swapping or being killed; file cache
            that can be dropped is free.
    """

    total_bytes: int
    available_bytes: int


def host_memory() -> HostMemory:
    """Return the host memory now, of the machine or of the container around this process."""
    system = psutil.virtual_memory()
    total, available = float(system.total), float(system.available)
    for folder in _own_cgroups():
        limit = min(_number(folder / name, math.inf) for name in _LIMITS)
        used = max(_number(folder / name, 0) for name in _USED)
        left = limit - used + _file_cache(folder)
        total, available = min(total, limit), min(available, left)
    return HostMemory(total_bytes=int(total), available_bytes=int(max(0, min(total, available))))


def free_host_bytes() -> int:
    """Return the resident memory that this process can grow to without swapping, less a margin.

    The private memory that the process has already counts as free, because a budget counts the
    complete process; the files it maps are in the cache that counts as free anyway.

    The margin of 5 % of the memory, at least 512 MiB, is for other programs that grow, buffers of
    the kernel, and the file cache, which reading ahead and writing behind depend on. It is never
    more than a quarter of the free memory, or a small container would be left with nothing.
    """
    memory = host_memory()
    own = psutil.Process().memory_info()
    free = memory.available_bytes + own.rss - getattr(own, "shared", 0)
    margin = max(_HOST_MARGIN * memory.total_bytes, _HOST_MARGIN_BYTES)
    return int(free - min(margin, _HOST_MARGIN_AT_MOST * free))


def free_disk_bytes(folder: Path) -> int:
    """Return the bytes that the file system of a folder gives this user, less a margin.

    The folder need not exist yet. The margin of 1 %, at most 1 GiB, is for the file system's own
    metadata. Quotas are not counted: a run that exceeds one ends with `DiskFull` and can be
    resumed.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    return int(free - min(_DISK_MARGIN_BYTES, _DISK_MARGIN * free))


def same_disk(one: Path, other: Path) -> bool:
    """Return whether two folders, which need not exist yet, share a file system."""
    return nearest_folder(one).stat().st_dev == nearest_folder(other).stat().st_dev


def nearest_folder(path: Path) -> Path:
    """Return the path if it is a folder, else the nearest existing one above it."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def _own_cgroups() -> Iterator[Path]:
    """Yield the folders of the cgroups that limit this process.

    Inside a container the path may be one of the host, of which only the root is visible. A
    missing file limits nothing.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        # Version 2 has one line for all controllers, which names none.
        if not controllers or "memory" in controllers.split(","):
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            own = root / path.lstrip("/")
            yield from (one for one in (own, *own.parents) if one.is_relative_to(root))


def _number(path: Path, otherwise: float) -> float:
    """Return the number in a file; `otherwise` if it says "max", or is missing."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return otherwise


def _file_cache(folder: Path) -> int:
    """Return the bytes of files that a cgroup keeps in memory; it can drop them."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = {key: int(value) for key, value in (line.split() for line in lines)}
    # Version 1 says "total_…" for a cgroup with its children, version 2 always means that.
    return sum(values.get(f"total_{key}", values.get(key, 0)) for key in _FILE_CACHE)
