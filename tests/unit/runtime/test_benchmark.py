"""The measured rates: positive, within their memory, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_gblm.runtime import benchmark as rates
from lowmem_gblm.runtime.benchmark import (
    flops_rate,
    memory_rate,
    probe_bytes,
    product_side,
    read_rate,
    write_rate,
)

CPU = torch.device("cpu")
SHAPES = [(64, 64), (16, 64), (16, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
MIB = 1 << 20
SHORT_S = 0.01


def multiply(shapes=SHAPES, *, dtype=torch.float32, limit_bytes=16 * MIB) -> float:
    return flops_rate(CPU, dtype, shapes, 32, limit_bytes=limit_bytes, seconds=SHORT_S)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What `torch.mm` writes into."""
    seen: list[torch.Tensor] = []
    product = torch.mm

    def watching(one, other, *, out):
        seen.append(out)
        assert one.dtype == other.dtype == out.dtype
        return product(one, other, out=out)

    monkeypatch.setattr(torch, "mm", watching)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_measured(dtype: torch.dtype, outputs: list[torch.Tensor]) -> None:
    assert multiply(dtype=dtype) > 0
    assert {out.dtype for out in outputs} == {dtype}
    assert {(32, 64), (32, 16)} <= {tuple(out.shape) for out in outputs}


def test_a_cpu_is_never_measured_in_float16(outputs: list[torch.Tensor]) -> None:
    multiply(dtype=torch.float16)
    assert {out.dtype for out in outputs} == {torch.float32}


def test_a_large_matrix_is_cut_to_the_memory(outputs: list[torch.Tensor]) -> None:
    multiply([(50_000, 60_000)], limit_bytes=8 * MIB)
    rows, columns = max(out.shape for out in outputs)
    assert 4 * ((rows + columns) * 60_000 + rows * columns) <= 4 * MIB


def test_a_slow_machine_multiplies_less(monkeypatch: pytest.MonkeyPatch) -> None:
    flops: list[int] = []

    def million_per_second(action, seconds, device):
        input_TI, weight_IO = action.args
        flops.append(2 * len(input_TI) * weight_IO.numel())
        return flops[-1] / 1e6

    monkeypatch.setattr(rates, "_seconds", million_per_second)
    assert flops_rate(
        CPU, torch.float32, [(4096, 64)], 4096, limit_bytes=64 * MIB
    ) == pytest.approx(1e6)
    first, second = flops
    assert first > 100e6
    assert second <= 1e6 / 8


def test_matrices_count_as_often_as_they_are_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_product_rate", lambda *given: {8: 1.0, 16: 4.0}[given[-2]])
    assert multiply([(8, 4), (8, 4), (8, 4), (16, 4)]) == pytest.approx((96 + 64) / (96 + 16))


@settings(deadline=None, database=None)
@given(st.integers(1, 60_000), st.integers(1, 10**8), st.floats(1, 1e13))
def test_what_is_left_of_a_product_fits(inputs: int, numbers: int, flops: float) -> None:
    side = product_side(inputs, numbers, flops)
    assert side == 1 or 2 * side * inputs + side**2 <= numbers
    assert side == 1 or 2 * side**2 * inputs <= flops
    assert side <= 64 or side % 64 == 0


def test_memory_is_measured_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    absolute = torch.abs

    def watching(source, *, out):
        sizes.append(source.nbytes + out.nbytes)
        return absolute(source, out=out)

    monkeypatch.setattr(torch, "abs", watching)
    assert memory_rate(CPU, limit_bytes=MIB, seconds=SHORT_S) > 0
    assert max(sizes) <= MIB


def test_a_gpu_gives_no_more_than_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.accelerator, "free_bytes", lambda device: 3 << 30)
    assert probe_bytes(torch.device("cuda:1")) == 3 << 29
    assert probe_bytes(CPU) == 256 * MIB


@pytest.mark.parametrize("size", [1, 100_000, 9 * MIB], ids=["byte", "small", "pieces"])
def test_a_shard_is_read(tmp_path: Path, size: int) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(os.urandom(size))
    assert read_rate(shard, Path("/proc/not/yet"), seconds=SHORT_S) > 0
    assert list(tmp_path.iterdir()) == [shard]


def test_without_a_shard_a_file_without_a_name_is_read_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: dropped.append(given[-1]))
    assert read_rate(None, tmp_path / "not" / "yet", seconds=SHORT_S) > 0
    assert set(dropped) == {os.POSIX_FADV_DONTNEED}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("free", "longest"), [(1 << 40, 128), (80 * MIB, 16), (MIB, 8)])
def test_writing_appends_to_a_file_without_a_name_and_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, longest: int
) -> None:
    sizes: list[int] = []

    def watching(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size // MIB)
        assert not list(tmp_path.iterdir())

    def twenty_times(action, seconds):
        for _ in range(20):
            action()
        return 1.0

    monkeypatch.setattr(os, "fsync", watching)
    monkeypatch.setattr(rates, "free_disk_bytes", lambda folder: free)
    monkeypatch.setattr(rates, "_seconds", twenty_times)
    assert write_rate(tmp_path / "not" / "yet") == 8 * MIB
    assert sizes == [*range(8, longest + 1, 8)] * (20 * 8 // longest) + [
        *range(8, 20 * 8 % longest + 1, 8)
    ]
    assert not list(tmp_path.iterdir())


def test_writing_is_measured(tmp_path: Path) -> None:
    assert write_rate(tmp_path, seconds=SHORT_S) > 0


@pytest.mark.parametrize("measure", [write_rate, lambda folder: read_rate(None, folder)])
def test_a_folder_that_cannot_be_written_to_is_named(measure) -> None:
    with pytest.raises(OSError, match="/proc"):
        measure(Path("/proc/not/yet"))


def test_the_threads_are_those_of_a_run() -> None:
    threads = torch.get_num_threads()
    seen: set[int] = set()
    torch.set_num_threads(threads + 1)
    try:
        rates._seconds(lambda: seen.add(torch.get_num_threads()), SHORT_S)
        assert seen == {threads + 1}
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
