"""Gradient magnitudes in fewer bits: what comes back, what it takes, which masks it leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.methods import Statistics
from lowmem_gblm.methods.gblm import GblmOptions, gblm_scores
from lowmem_gblm.methods.masks import keep_mask, parse_pattern
from lowmem_gblm.sweeps.statistics import packing
from lowmem_gblm.sweeps.statistics.packing import pack, packed, unpack

HALF = parse_pattern("0.5")
SMALL_KINDS = ("bfloat16", "int8")
# Where both terms of the score count, and where the gradient's alone does.
GBLM_AGREEMENT = {"bfloat16": 0.999, "int8": 0.994}
GRADIENT_AGREEMENT = {"bfloat16": 0.999, "int8": 0.993}
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).tiny


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, columns: int, sigma: float) -> Tensor:
    """Log-normal magnitudes whose rows and columns differ much from each other, too."""
    logs = sigma * normal(rows, columns, seed=0) + normal(rows, 1, seed=1)
    return 1e-4 * (logs + normal(1, columns, seed=2)).exp()


def reread(magnitude: Tensor, kind: str) -> Tensor:
    return unpack(pack(magnitude, kind), kind, magnitude.shape)


@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    ("rows", "columns"), [(256, 256), (64, 1000), (300, 97), (64, 4096), (1024, 64)]
)
def test_masks_are_those_of_float32(rows, columns, sigma, in_first, kind) -> None:
    magnitude = heavy_tailed(rows, columns, sigma)
    weight, input_norm = normal(rows, columns, seed=3), normal(columns, seed=4).exp()
    read = reread(magnitude.T.contiguous(), kind).T if in_first else reread(magnitude, kind)
    balanced = float(input_norm.median() / magnitude.median())
    for alpha, least in ((balanced, GBLM_AGREEMENT), (1e4 * balanced, GRADIENT_AGREEMENT)):
        found = mask(weight, input_norm, read, alpha)
        expected = mask(weight, input_norm, magnitude, alpha)
        assert (found == expected).float().mean() >= least[kind]


def mask(weight: Tensor, input_norm: Tensor, magnitude: Tensor, alpha: float) -> Tensor:
    statistics = Statistics({"input_norm": input_norm, "gradient_l1": magnitude})
    return keep_mask(gblm_scores(weight, statistics, GblmOptions(alpha=alpha)), HALF, "row")


@pytest.mark.parametrize("shape", [(1,), (3, 5), (17, 31), (256, 256), (2, 9, 300)])
def test_float32_comes_back_to_the_bit_and_takes_no_copy(shape) -> None:
    magnitude = normal(*shape, seed=0).abs()
    read = reread(magnitude, "float32")
    assert torch.equal(read, magnitude)
    assert read.data_ptr() == magnitude.data_ptr()


@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (17, 31), (256, 256), (2, 9, 300)])
def test_a_magnitude_comes_back_in_its_shape_and_nearly(shape, kind) -> None:
    magnitude = heavy_tailed(1, torch.Size(shape).numel(), 1.0).view(shape)
    before = magnitude.clone()
    read = reread(magnitude, kind)
    assert torch.equal(magnitude, before)
    assert (read.shape, read.dtype) == (magnitude.shape, torch.float32)
    # Within two decades of the largest, where most of what is kept lies.
    large = magnitude > magnitude.max() / 100
    error = ((read - magnitude).abs() / magnitude)[large].max()
    assert error < {"bfloat16": 2**-8, "int8": 0.09}[kind]


def packed_bytes(numel: int, kind: str) -> int:
    if kind == "int8":
        return numel + 4 * -(-numel // 256)
    return numel * (4 if kind == "float32" else 2)


@pytest.mark.parametrize("kind", ["float32", *SMALL_KINDS])
@given(numel=st.integers(1, 2000))
def test_it_takes_what_arithmetic_says(numel, kind) -> None:
    parts = pack(torch.ones(numel), kind)
    described = [(part.dtype, tuple(part.shape)) for part in parts]
    assert described == list(packed("a", kind, (numel,)).values())
    assert sum(part.nbytes for part in parts) == packed_bytes(numel, kind)


def test_bytes_per_magnitude() -> None:
    magnitudes = torch.ones(1 << 20)
    bytes_each = {
        kind: sum(part.nbytes for part in pack(magnitudes, kind)) / (1 << 20)
        for kind in ("float32", *SMALL_KINDS)
    }
    assert bytes_each == {"float32": 4, "bfloat16": 2, "int8": 1.015625}


@pytest.mark.parametrize("kind", ["float32", *SMALL_KINDS])
def test_zeros_come_back_as_zeros(kind) -> None:
    magnitude = heavy_tailed(40, 100, 2.0)
    magnitude[:, ::3] = 0
    magnitude[:9] = 0
    zero = magnitude == 0
    read = reread(magnitude, kind)
    assert not read[zero].any()
    assert not read.signbit().any()


@pytest.mark.parametrize("kind", ["float32", *SMALL_KINDS])
@pytest.mark.parametrize(
    "values", [[LARGEST, LARGEST], [LARGEST, SMALLEST], [SMALLEST], [LARGEST, 0.0], [1e-38, 1e38]]
)
def test_the_largest_range_stays_finite_and_in_order(values, kind) -> None:
    magnitude = torch.tensor(values)
    read = reread(magnitude, kind)
    assert read.isfinite().all()
    assert (read >= 0).all()
    torch.testing.assert_close(read.max(), magnitude.max(), rtol=0.01, atol=0)
    assert torch.equal(read.diff().sign(), magnitude.diff().sign())


@pytest.mark.parametrize("kind", ["float32", *SMALL_KINDS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value, kind) -> None:
    magnitude = torch.ones(3, 300)
    magnitude[1, 7] = value
    with pytest.raises(NonFiniteError, match="a gradient magnitude is NaN or infinite"):
        pack(magnitude, kind)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitude = heavy_tailed(70, 111, 2.0)
    whole = pack(magnitude, "int8")
    monkeypatch.setattr(packing, "_TILE", 512)
    parts = pack(magnitude, "int8")
    assert all(torch.equal(one, other) for one, other in zip(parts, whole, strict=True))
    read = unpack(parts, "int8", magnitude.shape)
    monkeypatch.undo()
    assert torch.equal(read, unpack(whole, "int8", magnitude.shape))


def test_a_transposed_magnitude_is_kept_as_it_is_read() -> None:
    magnitude = heavy_tailed(30, 50, 1.0)
    assert torch.equal(reread(magnitude.T, "int8"), reread(magnitude.T.contiguous(), "int8"))
