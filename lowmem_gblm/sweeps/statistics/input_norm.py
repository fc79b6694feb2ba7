"""Norm of the inputs of a matrix: averaged over samples, summed over tokens."""

from __future__ import annotations

from torch import Tensor

from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.finite import are_finite


class InputNorm:
    """`sqrt((1/N) sum_n sum_t x_n[t, j]^2)`, float32 [in] for every slot.

    Wanda (arXiv 2306.11695) calls it `scaler_row`.

    Args:
        nsamples: N; an expert that saw no token of a sample counts it as zeros.
    """

    name = "input_norm"

    def __init__(self, nsamples: int) -> None:
        self._nsamples = nsamples
        self._squares: dict[MatmulWeight, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def observe(self, product: Matmul) -> None:
        squares_I = self._squares_of(product)
        if product.slot in self._squares:
            self._squares[product.slot] += squares_I
        else:
            self._squares[product.slot] = squares_I.clone()

    def _squares_of(self, product: Matmul) -> Tensor:
        """Sums of squares; those of the last input again where it is the same tensor."""
        if self._last is None or self._last[0] is not product.input:
            self._last = product.input, product.input_TI.float().square().sum(dim=0)
        return self._last[1]

    def is_finite(self) -> bool:
        """Whether no sample so far was NaN or infinite."""
        return are_finite(self._squares.values())

    def result(self, slot: MatmulWeight) -> Tensor | None:
        """float32 [in]; None for an expert that saw no token."""
        if slot not in self._squares:
            return None
        return (self._squares[slot] / self._nsamples).sqrt()

    def finish_sample(self) -> None:
        """Let go of the last input."""
        self._last = None
