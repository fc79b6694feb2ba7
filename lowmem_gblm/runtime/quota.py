"""What disk quotas leave to this user and its groups, asked of the Linux kernel.

Quotas of a project or a folder (XFS, ext4, ZFS, btrfs) and of most servers show in what the file
system says is free; those of users and groups do not.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# From linux/quota.h and asm-generic/unistd.h; the number is the same on all architectures.
_QUOTACTL_FD = 443
_GET_QUOTA = 0x800007
_USER, _GROUP = 0, 1
_LIMIT_UNIT = 1024
_HAS_LIMITS, _HAS_SPACE = 1, 2


class _DiskQuota(ctypes.Structure):
    """`struct if_dqblk`: limits in KiB, 0 for none; space in bytes."""

    _fields_ = (
        ("hard_limit", ctypes.c_uint64),
        ("soft_limit", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
        ("unused", ctypes.c_uint64 * 5),
        ("valid", ctypes.c_uint32),
    )


def quota_left_bytes(folder: Path) -> int | None:
    """What may still be written to the file system of a folder; None where no quota limits it.

    Soft limits may be exceeded for days, so only hard ones count. Root is not limited by any.
    """
    if not sys.platform.startswith("linux") or os.geteuid() == 0:
        return None
    asked = [(_USER, os.geteuid())]
    asked += [(_GROUP, group) for group in sorted({os.getegid(), *os.getgroups()})]
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return None
    try:
        quotas = [_quota(descriptor, kind, owner) for kind, owner in asked]
    finally:
        os.close(descriptor)
    known = _HAS_LIMITS | _HAS_SPACE
    left = [
        one.hard_limit * _LIMIT_UNIT - one.space
        for one in quotas
        if one is not None and one.valid & known == known and one.hard_limit
    ]
    return max(0, min(left)) if left else None


def _quota(descriptor: int, kind: int, owner: int) -> _DiskQuota | None:
    """What the kernel says; None if it knows of no such quota, or is too old to be asked so."""
    found = _DiskQuota()
    command = _GET_QUOTA << 8 | kind
    failed = ctypes.CDLL(None).syscall(
        _QUOTACTL_FD,
        ctypes.c_uint(descriptor),
        ctypes.c_uint(command),
        ctypes.c_uint(owner),
        ctypes.byref(found),
    )
    return None if failed else found
