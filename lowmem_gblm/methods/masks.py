"""Which weights stay: exact counts, ties broken by position, N:M along the input dimension.

Arithmetic only: no file, no device choice, no model. A *score* is larger for a weight that should
stay; a *keep* mask is True where the weight stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from lowmem_gblm.errors import RequestError, shown_value

if TYPE_CHECKING:
    from torch import Tensor

Group = Literal["row", "matrix"]


@dataclass(frozen=True)
class Unstructured:
    """Each comparison group of n weights loses exactly `floor(n * sparsity)` of them."""

    sparsity: Decimal

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise RequestError(
                f"the sparsity must lie between 0 and 1, both excluded; got {self.sparsity}"
            )

    def __str__(self) -> str:
        return "unstructured"

    def removed(self, group_size: int) -> int:
        """Return how many weights of a group to remove: `floor(group_size * sparsity)`."""
        return math.floor(group_size * Fraction(self.sparsity))


@dataclass(frozen=True)
class NofM:
    """Of every M consecutive weights along the input dimension, exactly N stay.

    If M does not divide a width, `keep_ragged_tail` leaves the last `width mod M` columns dense;
    otherwise such a width is an error.
    """

    n: int
    m: int
    keep_ragged_tail: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RequestError(
                f"a pattern N:M needs 0 < N < M (N weights stay of every M); got {self}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> Decimal:
        """Return the fraction of zeros in a matrix whose width M divides."""
        return 1 - Decimal(self.n) / Decimal(self.m)

    def removed(self, group_size: int) -> int:
        """Return how many weights of a group to remove: none of a ragged tail."""
        return self.m - self.n if group_size == self.m else 0

    def check_width(self, name: str, in_features: int) -> None:
        """Raise `RequestError` if M does not divide the width of the named matrix."""
        if in_features % self.m and not self.keep_ragged_tail:
            raise RequestError(
                f"{name} has {in_features} inputs, which {self.m} does not divide: the pattern "
                f"{self} leaves a tail of {in_features % self.m}. Choose another pattern, "
                f"--exclude the tensor, or leave such tails dense with --on-ragged keep."
            )


Pattern = Unstructured | NofM


def as_sparsity(value: Any) -> Any:
    """Return a fraction of zeros as it is given; raise `RequestError` for what is no number."""
    _decimal(value)
    return value


def as_pattern(value: Any) -> str:
    """Return "2:4" for that text or for `(2, 4)`."""
    if isinstance(value, tuple):
        return ":".join(map(str, value))
    if not isinstance(value, str):
        raise RequestError(f'the pattern must read "2:4" or (2, 4); got {shown_value(value)}')
    return value


def parse_pattern(
    sparsity: str | float | Decimal | None,
    pattern: str | None = None,
    *,
    keep_ragged_tail: bool = False,
) -> Pattern:
    """Return the pattern meant by a sparsity, an "N:M", or both where they agree.

    A float is taken as the decimal that it prints as; without a sparsity it is 0.5. The `pattern`
    "unstructured" means none; `keep_ragged_tail` is that of `NofM`.
    """
    if pattern is None or pattern == "unstructured":
        return parse_sparsity("0.5" if sparsity is None else sparsity)
    parsed = parse_n_of_m(pattern, keep_ragged_tail)
    if sparsity is not None and float(_decimal(sparsity)) != float(parsed.sparsity):
        raise RequestError(
            f"--sparsity {sparsity} contradicts --pattern {parsed}, which is a sparsity of "
            f"{parsed.sparsity}: give one of the two"
        )
    return parsed


def parse_sparsity(value: str | float | Decimal) -> Unstructured:
    """Return the pattern meant by a sparsity; a float is taken as the decimal it prints as."""
    return Unstructured(_decimal(value))


def parse_n_of_m(text: str, keep_ragged_tail: bool) -> NofM:
    """Return the pattern meant by "N:M"."""
    try:
        n, m = (int(part) for part in text.split(":"))
    except (ValueError, AttributeError):
        raise RequestError(
            f'the pattern must read "N:M", as in 2:4 for 2 kept of every 4; got {text!r}'
        ) from None
    return NofM(n, m, keep_ragged_tail)


def _decimal(value: str | float | Decimal) -> Decimal:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        number = Decimal("NaN")
    if number.is_nan():
        raise RequestError(f"the sparsity must be a number such as 0.5; got {value!r}")
    return number


def keep_mask(score_OI: Tensor, pattern: Pattern, group: Group) -> Tensor:
    """Choose the weights of one matrix that stay: bool [out, in], on the device of the scores.

    Scores [out, in] are finite, and not modified; `group` is that of an unstructured pattern.
    """
    if isinstance(pattern, NofM):
        return keep_n_of_m(score_OI, pattern)
    groups_GN = score_OI if group == "row" else score_OI.reshape(1, -1)
    keep_GN = keep_largest(groups_GN, pattern.removed(groups_GN.shape[1]))
    return keep_GN.view(score_OI.shape)


def keep_largest(score_GN: Tensor, removed: int) -> Tensor:
    """Remove the `removed` smallest of finite scores [groups, group size]; return bool, alike.

    The k-th smallest value of each row decides; only in rows in which it occurs more often than may
    be removed do positions count: among equals the lower index is removed first.
    """
    import torch

    if removed == 0:
        return torch.ones_like(score_GN, dtype=torch.bool)
    threshold_G1 = kth_smallest(score_GN, removed)
    keep_GN: Tensor = score_GN > threshold_G1
    kept_G = keep_GN.sum(dim=1, dtype=torch.int32)
    short = (kept_G < score_GN.shape[1] - removed).nonzero().flatten()
    if score_GN.is_cpu or len(score_GN) == 1:
        for row in short.tolist():
            tied = (score_GN[row] == threshold_G1[row]).nonzero().flatten()
            missing = score_GN.shape[1] - removed - int(kept_G[row])
            keep_GN[row, tied[len(tied) - missing :]] = True
    elif len(short):
        kept_SN, tied_SN = keep_GN[short], score_GN[short] == threshold_G1[short]
        keep_GN[short] = with_last_tied(kept_SN, tied_SN, score_GN.shape[1] - removed)
    return keep_GN


def with_last_tied(keep_GN: Tensor, tied_GN: Tensor, kept: int) -> Tensor:
    """Keep, beside `keep_GN`, the last of the tied of every row, until `kept` of the row stay.

    All rows at once: a GPU would wait for the host three times a row.
    """
    import torch

    missing_G1 = kept - keep_GN.sum(dim=1, keepdim=True)
    from_last_GN = tied_GN.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return keep_GN | (tied_GN & (from_last_GN <= missing_G1))


def kth_smallest(score_GN: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value of every row, [groups, 1]; k counts from 1.

    On a CPU by NumPy, whose selection uses vector instructions. On a GPU, whose own selection keeps
    one multiprocessor busy with a row, a single row is bisected.
    """
    if not score_GN.is_cpu and len(score_GN) == 1 and score_GN.dtype.itemsize == 4:
        return bisected(score_GN, k)
    if not score_GN.is_cpu or score_GN.dtype.itemsize < 4:
        return score_GN.kthvalue(k, dim=1, keepdim=True).values
    import numpy
    import torch

    column = numpy.partition(score_GN.numpy(), k - 1, axis=1)[:, k - 1 : k]
    return torch.from_numpy(column.copy())


def bisected(score_GN: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of all float32 scores, [1, 1], by 32 counts; none is NaN.

    Read as integers, floats rank as they do as numbers, negative ones in reverse.
    """
    import torch

    bits_GN = score_GN.view(torch.int32)
    rank_GN = bits_GN >> 31
    rank_GN &= 0x7FFFFFFF
    rank_GN ^= bits_GN
    found = torch.full((), -(1 << 31), dtype=torch.int64, device=score_GN.device)
    for power in range(31, -1, -1):
        larger = found + (1 << power)
        found = torch.where((rank_GN < larger).sum() < k, larger, found)
    rank = found.to(torch.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).view(torch.float32).reshape(1, 1)


def keep_n_of_m(score_OI: Tensor, pattern: NofM) -> Tensor:
    """Keep the N largest of every M consecutive scores of a row; ties as in `keep_largest`."""
    import torch

    keep_OI = torch.ones_like(score_OI, dtype=torch.bool)
    width = score_OI.shape[1] // pattern.m * pattern.m
    score_OGM = score_OI[:, :width].unflatten(1, (-1, pattern.m))
    keep_OGM = keep_OI[:, :width].unflatten(1, (-1, pattern.m))
    order_OGM = score_OGM.argsort(dim=2, stable=True)
    keep_OGM.scatter_(2, order_OGM[:, :, : pattern.m - pattern.n], False)
    return keep_OI


def zero_removed(values_OI: Tensor, keep_OI: Tensor) -> None:
    """Write `+0.0` in place where `keep_OI`, bool, is False; all other values stay to the bit.

    Integers are multiplied: on a CPU this is vectorized, `masked_fill_` is not. A product of
    floats could leave `-0.0`.
    """
    _bits(values_OI).mul_(keep_OI)


def count_nonzero(values_OI: Tensor) -> Tensor:
    """Return how many values are neither `+0.0` nor `-0.0`: int64, 0-dim, on their device.

    A CPU counts integers faster; on a GPU their copy would only take memory.
    """
    import torch

    if not values_OI.is_cpu:
        return values_OI.count_nonzero()
    bits_OI = _bits(values_OI)
    return (bits_OI & torch.iinfo(bits_OI.dtype).max).count_nonzero()


def _bits(values: Tensor) -> Tensor:
    """Return floating-point values as signed integers of their size, in the same memory."""
    import torch

    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(kinds[values.itemsize])
