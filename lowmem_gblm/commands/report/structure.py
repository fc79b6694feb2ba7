"""How zeros lie in a matrix, against chance: arithmetic on masks, True where a weight is zero.

Chance means: every comparison group has the zeros that it has, at places drawn with equal
probability. The zeros of a row or column are then a sum of independent hypergeometric numbers, one
for every group that it crosses. Where weights compete within a row the sum of a column is binomial,
if all rows have as many zeros, and the number of a row is fixed: it has no variance.

Suffixes of shapes: O outputs, I inputs, L lines (rows or columns), B bins; V and R count comparison
groups one above the other and side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Self, TypeVar

import numpy
import torch
from torch import Tensor

from lowmem_gblm.commands.promised_groups import PromisedGroups

BINS = 50
# Groups of single rows are counted for so many rows at a time.
_ROWS_AT_ONCE = 256


class _Sums:
    """Numbers of one matrix or of several: every field is a sum over matrices."""

    def __add__(self, other: Self) -> Self:
        names = [one.name for one in fields(self)]  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


Sums = TypeVar("Sums", bound=_Sums)


def total(parts: Iterable[Sums]) -> Sums:
    """Return the sum of at least one."""
    return reduce(add, parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines(_Sums):
    """Zeros per row, or zeros per column.

    Attributes:
        lines: How many rows or columns.
        dead: Those in which every weight is zero.
        dead_by_chance: How many of them chance makes, if the zeros of a line were independent.
        squares: Sum of the squared differences between the zeros of a line and those by chance.
        squares_by_chance: Expected value of `squares`.
        histogram_B: Lines by their fraction of zeros, in bins of equal width from 0 to 1.
        histogram_by_chance_B: The same by chance, in the normal approximation.
    """

    lines: int
    dead: int
    dead_by_chance: float
    squares: float
    squares_by_chance: float
    histogram_B: Tensor
    histogram_by_chance_B: Tensor

    @property
    def dispersion(self) -> float | None:
        """Return the variance over that by chance; None where the pattern fixes every line."""
        return self.squares / self.squares_by_chance if self.squares_by_chance else None

    @property
    def variance(self) -> float:
        """Return the mean squared difference of a line from its number of zeros by chance."""
        return self.squares / self.lines


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure(_Sums):
    """The zeros of matrices [out, in]."""

    weights: int
    zeros: int
    rows: Lines
    columns: Lines

    @property
    def sparsity(self) -> float:
        """Return the fraction of zeros."""
        return self.zeros / self.weights


@dataclass(frozen=True, kw_only=True)
class Overlap(_Sums):
    """The zeros of two masks of the same matrices: `common` to both, in `either`."""

    weights: int
    common: int
    either: int
    common_by_chance: float

    @property
    def share(self) -> float:
        """Return the fraction of weights that are zero in both."""
        return self.common / self.weights

    @property
    def share_by_chance(self) -> float:
        """Return the product of the two sparsities."""
        return self.common_by_chance / self.weights

    @property
    def jaccard(self) -> float:
        """Return common zeros over zeros in either; 1 where neither has any."""
        return self.common / self.either if self.either else 1.0

    @property
    def jaccard_by_chance(self) -> float:
        """Return the Jaccard index of masks with `common_by_chance` zeros in common."""
        either = self.common + self.either - self.common_by_chance
        return self.common_by_chance / either if either else 1.0


def structure(zero_OI: Tensor, groups: Sequence[PromisedGroups]) -> Structure:
    """Return how the zeros of a matrix lie, cut into comparison groups from its first input on."""
    outputs, inputs = zero_OI.shape
    mean_O, variance_O = torch.zeros(2, outputs, dtype=torch.float64)
    mean_I, variance_I = torch.zeros(2, inputs, dtype=torch.float64)
    for one, down, across in _cuts(outputs, groups):
        cut = zero_OI[down, across].unflatten(1, (one.repeat, -1)).unflatten(0, (-1, one.rows))
        share_VR = _count(cut, 1, 3).double() / one.size
        spread_VR = share_VR * (1 - share_VR) / max(1, one.size - 1)
        row_V = spread_VR.sum(dim=1) * one.columns * (one.size - one.columns)
        column_R = spread_VR.sum(dim=0) * one.rows * (one.size - one.rows)
        mean_O[down] += (share_VR.sum(dim=1) * one.columns).repeat_interleave(one.rows)
        variance_O[down] += row_V.repeat_interleave(one.rows)
        mean_I[across] += (share_VR.sum(dim=0) * one.rows).repeat_interleave(one.columns)
        variance_I[across] += column_R.repeat_interleave(one.columns)
    zeros_O, zeros_I = _count(zero_OI, 1), _count(zero_OI, 0)
    return Structure(
        weights=zero_OI.numel(),
        zeros=int(zeros_O.sum()),
        rows=_lines(zeros_O, inputs, mean_O, variance_O),
        columns=_lines(zeros_I, outputs, mean_I, variance_I),
    )


def _cuts(
    outputs: int, groups: Sequence[PromisedGroups]
) -> Iterator[tuple[PromisedGroups, slice, slice]]:
    """Yield complete groups of one size with the outputs and inputs that they cover."""
    start = 0
    for one in groups:
        across = slice(start, start + one.columns * one.repeat)
        at_once = max(one.rows, _ROWS_AT_ONCE)
        for top in range(0, outputs, at_once):
            yield one, slice(top, min(outputs, top + at_once)), across
        start = across.stop


def _count(zero: Tensor, *dims: int) -> Tensor:
    """Return how many are True along dimensions, by NumPy: torch would make integers of all."""
    return torch.from_numpy(numpy.count_nonzero(zero.numpy(), axis=dims))


def _lines(zeros_L: Tensor, length: int, mean_L: Tensor, variance_L: Tensor) -> Lines:
    """Compare the zeros of lines of `length` weights with their mean and variance by chance."""
    bin_L = (zeros_L * BINS // length).clamp(max=BINS - 1)
    return Lines(
        lines=len(zeros_L),
        dead=int((zeros_L == length).sum()),
        dead_by_chance=float((mean_L / length).pow(length).sum()),
        squares=float((zeros_L - mean_L).square().sum()),
        squares_by_chance=float(variance_L.sum()),
        histogram_B=bin_L.bincount(minlength=BINS),
        histogram_by_chance_B=_by_chance(length, mean_L, variance_L),
    )


def _by_chance(length: int, mean_L: Tensor, variance_L: Tensor) -> Tensor:
    """Return how many lines are expected in each bin, float64 [bins].

    A bin holds complete counts: each of its edges lies half a count below its first one.
    """
    first_B = -(torch.arange(1, BINS) * -length // BINS)
    # A line without variance is all in the bin of its mean.
    deviation_L1 = variance_L.sqrt().clamp(min=1e-9)[:, None]
    below_LB = torch.special.ndtr((first_B - 0.5 - mean_L[:, None]) / deviation_L1)
    below_B = below_LB.sum(dim=0)
    ends = below_B.new_tensor([0, len(mean_L)])
    return torch.cat([ends[:1], below_B, ends[1:]]).diff()


def overlap(zero_OI: Tensor, other_OI: Tensor) -> Overlap:
    """Compare two masks of one matrix."""
    masks = (zero_OI, other_OI, zero_OI & other_OI)
    zeros, others, common = (int(numpy.count_nonzero(mask.numpy())) for mask in masks)
    return Overlap(
        weights=zero_OI.numel(),
        common=common,
        either=zeros + others - common,
        common_by_chance=zeros * others / zero_OI.numel(),
    )


def density(zero_OI: Tensor, longest: int) -> Tensor:
    """Return fractions of zeros on a coarser grid, float32, at most `longest` fields a side.

    Fields are about square; where they do not come out even, neighbours share a row or column. The
    differences of a field of n weights from the fraction of the matrix are enlarged by √n / 2, as
    the noise of a random mask becomes smaller by √n.
    """
    scale = max(1.0, max(zero_OI.shape) / longest)
    rows, columns = (max(1, round(length / scale)) for length in zero_OI.shape)
    # Rows by rows: the mask as floating-point numbers would be four times as large.
    starts = [zero_OI.shape[0] * row // rows for row in range(rows + 1)]
    slabs = [zero_OI[start:stop] for start, stop in pairwise(starts)]
    means_RI = torch.stack([_count(slab, 0) / len(slab) for slab in slabs])
    density_RC = torch.nn.functional.adaptive_avg_pool1d(means_RI, columns)
    mean, contrast = density_RC.mean(), max(1.0, scale / 2)
    density_RC = mean + contrast * (density_RC - mean)
    return density_RC.clamp(0, 1)
