"""Gram matrix of the inputs of a matrix, for SparseGPT."""

from __future__ import annotations

from torch import Tensor

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.finite import are_finite


class Gram:
    """`(2/N) sum_n x_n^T x_n`, float32 [in, in] for every slot.

    Slots that are multiplied with one and the same tensor (query, key and value; gate and up) share
    one matrix.

    Args:
        nsamples: N.
    """

    name = "gram"

    def __init__(self, nsamples: int) -> None:
        self._nsamples = nsamples
        self._sums: dict[MatmulWeight, Tensor] = {}
        self._owner: dict[MatmulWeight, MatmulWeight] = {}
        self._last: tuple[Tensor, MatmulWeight] | None = None

    def observe(self, product: Matmul) -> None:
        owner = product.slot
        shared = self._last is not None and self._last[0] is product.input
        if shared and self._last is not None:
            owner = self._last[1]
        if self._owner.setdefault(product.slot, owner) != owner:
            raise UnsupportedModel(
                f"{product.slot} shares its input in some samples only: such a model is not "
                f"followed here"
            )
        if shared:
            return
        self._last = (product.input, owner)
        input_TI = product.input_TI.float()
        gram_II = input_TI.T @ input_TI
        if owner in self._sums:
            self._sums[owner] += gram_II
        else:
            self._sums[owner] = gram_II

    def is_finite(self) -> bool:
        """Whether no sample so far was NaN or infinite."""
        return are_finite(self._sums.values())

    def result(self, slot: MatmulWeight) -> Tensor | None:
        """float32 [in, in]; None for an expert that saw no token."""
        if slot not in self._owner:
            return None
        return self._sums[self._owner[slot]] * (2 / self._nsamples)

    def finish_sample(self) -> None:
        """Let go of the last input."""
        self._last = None
