"""Matrices in 4 and 8 bits: exact zeros, exact sizes, the same bits every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_gblm.errors import RequestError
from lowmem_gblm.model import bnb
from lowmem_gblm.model.bnb import BLOCK, Quantized, QuantizedKind, check_usable, quantize
from lowmem_gblm.sweeps.statistics.packing import pack, unpack

KINDS = ("nf4", "int8")
SHAPES = [(1, 1), (1, 2), (3, 1), (7, 9), (64, 64), (33, 129), (257, 511)]
# Half a step of the coarsest part of each map, of the largest in a block; bfloat16's own on top.
HALF_STEP = {"nf4": 0.153, "int8": 0.0075}


def pruned(matrix: Tensor) -> Tensor:
    """The matrix with every other number zero, and all of its first third."""
    values = matrix.clone().flatten()
    values[::2] = 0
    values[: len(values) // 3] = 0
    return values.view(matrix.shape)


def quantized_bytes(numel: int, kind: QuantizedKind) -> int:
    """Codes, and a float32 scale for every block of numbers."""
    codes_bytes = numel if kind == "int8" else -(-numel // 2)
    return codes_bytes + 4 * -(-numel // BLOCK[kind])


def bytes_of(quantized: Quantized) -> int:
    return quantized.codes.nbytes + quantized.scales.nbytes


def random_matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_comes_back_in_its_shape_and_nearly(kind, shape, dtype) -> None:
    matrix = random_matrix(shape).to(dtype)
    read = quantize(matrix, kind).dequantized()
    assert (read.shape, read.dtype) == (matrix.shape, dtype)
    assert read.is_contiguous()
    step = HALF_STEP[kind] + torch.finfo(dtype).eps
    assert (read - matrix).abs().max() <= step * matrix.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_come_back_as_zeros(kind, shape, dtype) -> None:
    for matrix in (pruned(random_matrix(shape).to(dtype)), torch.zeros(shape, dtype=dtype)):
        read = quantize(matrix, kind).dequantized()
        assert (read[matrix == 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_its_size_is_what_arithmetic_says(kind, shape) -> None:
    quantized = quantize(random_matrix(shape), kind)
    assert bytes_of(quantized) == quantized_bytes(shape[0] * shape[1], kind)


def test_bytes_per_number() -> None:
    assert quantized_bytes(1 << 20, "nf4") / (1 << 20) == 0.5625
    assert quantized_bytes(1 << 20, "int8") / (1 << 20) == 1.015625


@pytest.mark.parametrize("kind", KINDS)
def test_a_transposed_view_is_quantized_as_it_is_read(kind) -> None:
    matrix = random_matrix((40, 70))
    expected = quantize(matrix.T.contiguous(), kind).dequantized()
    assert torch.equal(quantize(matrix.T, kind).dequantized(), expected)


def checksum() -> str:
    """Of matrices and gradient magnitudes that were quantized and read again."""
    matrix = random_matrix((700, 333))
    digest = hashlib.sha256()
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            read = quantize(matrix.to(dtype), kind).dequantized()
            digest.update(read.float().numpy().tobytes())
    read = unpack(pack(matrix.abs(), "int8"), "int8", matrix.shape)
    digest.update(read.numpy().tobytes())
    return digest.hexdigest()


def test_the_bits_depend_on_no_run_no_thread_and_no_compiler() -> None:
    """In one process, which shows as well that bitsandbytes is not imported before it is needed."""
    code = (
        "import sys, lowmem_gblm.model.quantized_block, lowmem_gblm.sweeps.statistics.packing\n"
        "print('bitsandbytes' in sys.modules)\n"
        "import torch, test_bnb; torch.set_num_threads(2); print(test_bnb.checksum())"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parent,
        # No compiler is found there.
        env={**os.environ, "OMP_NUM_THREADS": "2", "PATH": "", "CC": "", "CXX": ""},
        capture_output=True,
        text=True,
    )
    assert run.stderr == ""
    assert run.stdout.split() == ["False", checksum()]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_tried_before_a_run_depends_on_it(
    kind: QuantizedKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_usable(torch.device("cpu"), kind)
    monkeypatch.setattr(bnb, "quantize", lambda *given: 1 / 0)
    said = f"bitsandbytes cannot quantize to {kind} on cpu: division by zero. Install a version"
    with pytest.raises(RequestError, match=said):
        check_usable(torch.device("cpu"), kind)
