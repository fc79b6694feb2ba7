"""SparseGPT: remove weights column by column and let the surviving ones make up for it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
2023. As in their code the input of a matrix enters through `H = (2/N) sum x^T x`, damped by 1 % of
its mean diagonal, and columns are swept in blocks of 128. Unlike their code, which removes every
weight up to and including the threshold, exactly `floor(n * sparsity)` weights of each block go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.methods import Decision, Method, Statistics
from lowmem_gblm.methods.masks import NofM, Pattern, keep_largest, keep_n_of_m
from lowmem_gblm.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 128
DAMPING = 0.01
_ATTEMPTS = 8


def solve(
    weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: NoOptions
) -> Decision:
    """Prune one matrix [out, in], which is not modified, and update the weights that stay.

    A comparison group is a block of 128 columns. N:M groups are chosen among the updated weights
    when the sweep reaches the group.

    Raises:
        NonFiniteError: The gram matrix is not finite, or stays indefinite however damped.
    """
    import torch

    weight_OI = weight_OI.float() if weight_OI.dtype != torch.float32 else weight_OI.clone()
    factor = statistics.derived("gram", inverse_factor)
    inverse_II, damping, dead_I = factor.upper_II, factor.damping, factor.dead_I
    # An expert that saw no token has no live column: its weights are then ranked by magnitude.
    if not bool(dead_I.all()):
        weight_OI[:, dead_I] = 0
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    columns = block_columns(pattern)
    for start in range(0, weight_OI.shape[1], columns):
        stop = min(start + columns, weight_OI.shape[1])
        error_OC = _sweep_columns(
            weight_OI[:, start:stop],
            keep_OI[:, start:stop],
            inverse_II[start:stop, start:stop],
            pattern,
        )
        weight_OI[:, stop:] -= error_OC @ inverse_II[start:stop, stop:]
    least, largest = weight_OI.aminmax()
    if not bool(least.isfinite() & largest.isfinite()):
        raise NonFiniteError("the updated weights are not finite")
    note = None
    if damping > DAMPING:
        note = f"the gram matrix was not positive definite; damping raised to {damping:g}"
    return Decision(keep=keep_OI, weight=weight_OI, note=note)


def block_columns(pattern: Pattern) -> int:
    """Columns per block: 128, or less so that no N:M group straddles two blocks."""
    if isinstance(pattern, NofM):
        return max(COLUMNS - COLUMNS % pattern.m, pattern.m)
    return COLUMNS


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of the inverse of a damped gram matrix [in, in].

    Attributes:
        damping: The share of the mean diagonal that was added to it.
        dead_I: bool [in]: inputs that were always zero; their diagonal is 1 instead.
    """

    upper_II: Tensor
    damping: float
    dead_I: Tensor


def inverse_factor(gram_II: Tensor) -> InverseFactor:
    """Factor the inverse of a gram matrix, which is not modified; four matrices live at once."""
    import torch

    dead_I = gram_II.diagonal() == 0
    damping = DAMPING
    for _ in range(_ATTEMPTS):
        damped_II = gram_II.clone()
        damped_II.diagonal()[dead_I] = 1
        mean = damped_II.diagonal().mean()
        if not bool(mean.isfinite()):
            raise NonFiniteError("the gram matrix of the inputs is not finite")
        damped_II.diagonal().add_(damping * mean)
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        del damped_II
        if not int(failed):
            inverse_II = torch.cholesky_inverse(factor_II)
            del factor_II
            upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
            if not int(failed):
                return InverseFactor(upper_II, damping, dead_I)
        damping *= 10
    raise NonFiniteError(f"the gram matrix stays indefinite at a damping of {damping / 10:g}")


def _sweep_columns(
    weight_OC: Tensor, keep_OC: Tensor, inverse_CC: Tensor, pattern: Pattern
) -> Tensor:
    """Sweep one block of columns in place; returns the errors [out, columns] to spread onwards."""
    import torch

    if not isinstance(pattern, NofM):
        score_OC = weight_OC**2 / inverse_CC.diagonal() ** 2
        removed = pattern.removed(score_OC.numel())
        keep_OC.copy_(keep_largest(score_OC.reshape(1, -1), removed).view_as(keep_OC))
    error_OC = torch.zeros_like(weight_OC)
    for column in range(weight_OC.shape[1]):
        if isinstance(pattern, NofM) and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            score_OM = weight_OC[:, group] ** 2 / inverse_CC.diagonal()[group] ** 2
            keep_OC[:, group] = keep_n_of_m(score_OM, pattern)
        value_O = weight_OC[:, column]
        kept_O = value_O.masked_fill(~keep_OC[:, column], 0)
        error_O = (value_O - kept_O) / inverse_CC[column, column]
        weight_OC[:, column:] -= error_O[:, None] * inverse_CC[column, column:]
        weight_OC[:, column] = kept_O
        error_OC[:, column] = error_O
    return error_OC


METHOD = Method(
    name="sparsegpt",
    title="OBS sweep, survivors updated",
    paper="Frantar & Alistarh 2023, arXiv 2301.00774",
    needs=("gram",),
    group="columns",
    block_columns=block_columns,
    decide=solve,
    updates_weights=True,
    bytes_per_weight=8,
    # While one factor, which is kept, is computed: two more matrices.
    bytes_per_squared_input=8,
    kept_per_squared_input=4,
    # Two factors and an inverse.
    flops_per_cubed_input=3,
    sweeps_columns=True,
)
