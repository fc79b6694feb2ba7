"""What is free: of host memory under cgroups, of a GPU, of a disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lowmem_gblm.runtime import machine
from lowmem_gblm.runtime.machine import (
    free_disk_bytes,
    free_host_bytes,
    host_memory,
    nearest_folder,
    same_disk,
)

MIB, GIB = 1 << 20, 1 << 30
TOTAL, AVAILABLE = 64 * GIB, 40 * GIB
UNLIMITED_V1 = 9223372036854771712


class Tree:
    """A made-up /sys/fs/cgroup, and the line that says where this process is in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._own = folder / "cgroup", folder / "own"
        monkeypatch.setattr(machine, "_CGROUPS", self._root)
        monkeypatch.setattr(machine, "_OWN_CGROUPS", self._own)

    def enter(self, *lines: str) -> None:
        self._own.write_text("".join(f"{line}\n" for line in lines))

    def write(self, folder: str, **files: object) -> None:
        (self._root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self._root / folder / f"memory.{name}").write_text(f"{content}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """64 GiB of which 40 are available, and cgroups to be made up."""
    system = SimpleNamespace(total=TOTAL, available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)
    return Tree(tmp_path, monkeypatch)


def seen() -> tuple[float, float]:
    memory = host_memory()
    return memory.total_bytes / GIB, memory.available_bytes / GIB


def test_without_cgroups_the_system_decides(tree: Tree) -> None:
    assert seen() == (64, 40)


def test_a_cgroup_without_files_limits_nothing(tree: Tree) -> None:
    tree.enter("4:memory:/docker/abc", "1:cpu,cpuacct:/", "0::/docker/abc")
    assert seen() == (64, 40)


@pytest.mark.parametrize("path", ["/", "/user.slice/run", "/of/the/host"])
def test_version_2_limits_at_any_level_above(tree: Tree, path: str) -> None:
    tree.enter(f"0::{path}")
    stat = f"anon {5 * GIB}\nfile {3 * GIB}\nactive_file {2 * GIB}\ninactive_file {GIB}"
    tree.write("", max=16 * GIB, current=10 * GIB, stat=stat)
    tree.write("user.slice", max="max", current=8 * GIB)
    tree.write("user.slice/run", max=20 * GIB, high="max", current=4 * GIB, stat="anon 7")
    assert seen() == (16, 9)


def test_the_tightest_level_decides(tree: Tree) -> None:
    tree.enter("0::/outer/inner")
    tree.write("outer", max=16 * GIB, current=GIB)
    tree.write("outer/inner", max=32 * GIB, high=12 * GIB, current=10 * GIB)
    tree.write("other", max=GIB, current=GIB)
    assert seen() == (12, 2)


def test_the_system_may_be_tighter_than_the_cgroup(tree: Tree) -> None:
    tree.enter("0::/")
    tree.write("", max=60 * GIB, current=GIB)
    assert seen() == (60, 40)


def test_a_cgroup_over_its_limit_has_nothing_left(tree: Tree) -> None:
    tree.enter("0::/")
    tree.write("", max=GIB, current=2 * GIB)
    assert seen() == (1, 0)


def test_version_1_counts_children_in_totals(tree: Tree) -> None:
    tree.enter("9:name=systemd:/", "4:memory:/job", "0::/")
    stat = f"active_file 5\ntotal_active_file {GIB}\ntotal_inactive_file {2 * GIB}"
    tree.write("memory/job", limit_in_bytes=8 * GIB, usage_in_bytes=6 * GIB, stat=stat)
    tree.write("memory", limit_in_bytes=UNLIMITED_V1, usage_in_bytes=30 * GIB)
    assert seen() == (8, 5)


@pytest.mark.parametrize(
    ("total", "available", "private", "free"),
    [
        (64 * GIB, 39 * GIB, GIB, 40 * GIB - 64 * GIB * 0.05),
        (4 * GIB, 2 * GIB, GIB, 3 * GIB - 512 * MIB),
        (512 * MIB, 300 * MIB, 100 * MIB, 300 * MIB),
        (512 * MIB, 0, 100 * MIB, 75 * MIB),
    ],
    ids=["5 % of all", "at least 512 MiB", "at most a quarter", "nothing left"],
)
def test_the_margin(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, total: int, available: int, private: int, free: int
) -> None:
    system = SimpleNamespace(total=total, available=available)
    info = SimpleNamespace(rss=private + 200 * MIB, shared=200 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    assert free_host_bytes() == int(free)


def test_where_files_are_not_told_apart_all_resident_memory_counts(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(rss=GIB)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    assert free_host_bytes() == int(41 * GIB - 0.05 * TOTAL)


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert 0 < free_host_bytes() < memory.total_bytes


@pytest.mark.parametrize(("free", "given"), [(50 * GIB, 49.5), (500 * GIB, 499), (0, 0)])
def test_what_is_free_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, given: float
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert free_disk_bytes(tmp_path / "not" / "yet") == given * GIB


def test_a_folder_that_is_not_there_is_on_the_disk_of_the_nearest_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert nearest_folder(Path("not/yet")) == tmp_path
    assert nearest_folder(tmp_path / "file" / "below") == tmp_path
    assert same_disk(Path("not/yet"), tmp_path)
    assert not same_disk(tmp_path, Path("/proc"))
