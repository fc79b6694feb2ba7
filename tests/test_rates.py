"""The measured rates: positive, in time, within their memory, and nothing left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_gblm.runtime import benchmark
from lowmem_gblm.runtime.benchmark import MachineSpeed, fitting, measure_machine

CPU = torch.device("cpu")
SHAPES = [(64, 64), (16, 64), (16, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
MIB = 1 << 20


def measure(write_to: Path, shapes=SHAPES, *, dtype=torch.float32, read_from=None, **options):
    options = {"seconds": 0.2, "limit_bytes": 16 * MIB} | options
    return measure_machine(CPU, dtype, shapes, 32, read_from, write_to, **options)


def positive(measured: MachineSpeed) -> bool:
    return min(vars(measured).values()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_positive_in_time_and_leave_no_file(dtype: torch.dtype, tmp_path: Path) -> None:
    start = time.monotonic()
    assert positive(measure(tmp_path / "not" / "yet", dtype=dtype))
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 100_000, 9 * MIB], ids=["byte", "small", "pieces"])
def test_a_shard_is_read(tmp_path: Path, size: int) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(os.urandom(size))
    assert positive(measure(tmp_path, read_from=shard))
    assert list(tmp_path.iterdir()) == [shard]


def test_a_large_matrix_is_cut_to_the_memory(tmp_path: Path, monkeypatch) -> None:
    sizes: list[int] = []
    product = torch.mm

    def watching(one, other, *, out):
        sizes.append(4 * (one.numel() + other.numel() + out.numel()))
        return product(one, other, out=out)

    monkeypatch.setattr(torch, "mm", watching)
    assert positive(measure(tmp_path, [(50_000, 60_000)], limit_bytes=8 * MIB))
    assert max(sizes) <= 4 * MIB


def test_a_cpu_is_never_measured_in_float16(tmp_path: Path, monkeypatch) -> None:
    dtypes: set[torch.dtype] = set()
    product = torch.mm

    def watching(one, other, *, out):
        dtypes.add(out.dtype)
        return product(one, other, out=out)

    monkeypatch.setattr(torch, "mm", watching)
    measure(tmp_path, dtype=torch.float16)
    assert dtypes == {torch.float32}


def test_matrices_count_as_often_as_they_are_in_a_block(tmp_path: Path, monkeypatch) -> None:
    # 1 s for every product: then the rate is the mean size of a matrix of the block.
    monkeypatch.setattr(benchmark, "_timed", lambda action, device: 1.0)
    monkeypatch.setattr(benchmark, "_memory_rate", lambda *given: 1.0)
    monkeypatch.setattr(benchmark._Product, "grow", whole)
    measured = measure(tmp_path, [(8, 4), (8, 4), (8, 4), (16, 4)], seconds=0.0)
    assert measured.products == pytest.approx(2 * 32 * (3 * 32 + 64) / 4)


def whole(product, device, aim_s) -> None:
    product.tokens, product.outputs = len(product.input_TI), len(product.weight_OI)


def test_a_folder_that_cannot_be_written_to_is_named() -> None:
    with pytest.raises(OSError, match="/proc"):
        measure(Path("/proc/not/yet"))


@settings(deadline=None, database=None)
@given(st.integers(1, 4096), st.integers(1, 60_000), st.integers(1, 60_000), st.integers(1, 10**8))
def test_what_is_left_of_a_product_fits(tokens: int, out: int, inputs: int, room: int) -> None:
    rows, columns = fitting(tokens, out, inputs, room)
    assert 1 <= rows <= tokens
    assert 1 <= columns <= out
    taken = (rows + columns) * inputs + rows * columns
    assert taken <= room or rows == 1 or columns == 1
    if (tokens + out) * inputs + tokens * out <= room:
        assert (rows, columns) == (tokens, out)
