"""What quotas leave: as the kernel says it, where one with quotas is at hand."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_gblm.runtime import quota
from lowmem_gblm.runtime.machine import free_disk_bytes
from lowmem_gblm.runtime.quota import _DiskQuota, quota_left_bytes

MIB, GIB = 1 << 20, 1 << 30
NOBODY = 65534

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="quotas are asked of Linux only")

Told = dict[tuple[int, int], _DiskQuota]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the kernel says of user 1000 with the groups 1000 and 50, by kind and number."""
    found: Told = {}
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: [50])
    monkeypatch.setattr(quota, "_quota", lambda fd, kind, owner: found.get((kind, owner)))
    return found


def limited(limit_kib: int, space: int, valid: int = 63) -> _DiskQuota:
    return _DiskQuota(hard_limit=limit_kib, space=space, valid=valid)


def test_the_structure_is_that_of_the_kernel() -> None:
    assert ctypes.sizeof(_DiskQuota) == 72
    offsets = [getattr(_DiskQuota, name).offset for name in ("hard_limit", "space", "valid")]
    assert offsets == [0, 16, 64]


def test_where_there_is_no_quota_nothing_is_limited(told: Told, tmp_path: Path) -> None:
    assert quota_left_bytes(tmp_path) is None
    told[0, 1000] = limited(0, 5 * GIB)
    told[1, 50] = limited(1024, 0, valid=0)
    assert quota_left_bytes(tmp_path) is None


def test_the_narrowest_quota_of_user_and_groups_counts(told: Told, tmp_path: Path) -> None:
    told[0, 1000] = limited(8 * 1024, 3 * MIB)
    assert quota_left_bytes(tmp_path) == 5 * MIB
    told[1, 50] = limited(4 * 1024, 3 * MIB)
    assert quota_left_bytes(tmp_path) == MIB
    told[1, 1000] = limited(1024, 2 * MIB)
    assert quota_left_bytes(tmp_path) == 0
    # Of other users and groups.
    told.clear()
    told[0, 1001] = told[1, 51] = limited(1024, 0)
    assert quota_left_bytes(tmp_path) is None


def test_root_is_not_limited(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told[0, 0] = told[1, 50] = limited(1024, 0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert quota_left_bytes(tmp_path) is None


@pytest.mark.parametrize(("left", "free"), [(GIB, 0.99), (900 * GIB, 499), (0, 0)])
def test_what_is_free_is_what_both_the_disk_and_the_quota_give(
    left: int, free: float, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told[0, 1000] = limited(left // 1024, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * GIB))
    if not left:
        told[0, 1000] = limited(1, 1024)
    assert free_disk_bytes(tmp_path) == pytest.approx(free * GIB)


def test_a_file_system_without_quotas_is_asked_and_limits_nothing(tmp_path: Path) -> None:
    assert in_a_child(lambda: quota_left_bytes(Path("/proc"))) == "None"


def test_a_folder_that_may_not_be_read_limits_nothing(told: Told) -> None:
    told[0, 1000] = limited(1024, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda *args: (_ for _ in ()).throw(PermissionError()))
        assert quota_left_bytes(Path("/")) is None


def test_the_quota_of_a_real_file_system(tmp_path: Path) -> None:
    options = "size=16m,usrquota,usrquota_block_hardlimit=4m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs, and a kernel with quotas for it (6.6)")
    try:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", NOBODY, NOBODY)

        def fill() -> int | None:
            (tmp_path / "theirs" / "file").write_bytes(bytes(MIB))
            return quota_left_bytes(tmp_path)

        assert int(in_a_child(fill)) == pytest.approx(3 * MIB, abs=64 << 10)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def in_a_child(work: Callable[[], object]) -> str:
    """What `work` returns in a process of a user who is not root."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            os.write(writing, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as answer:
        return answer.read().decode()
