"""Norm of the inputs of a matrix: averaged over samples, summed over tokens."""

from torch import Tensor

from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic


class InputNorm(ActivationStatistic):
    """`sqrt((1/N) sum_n sum_t x_n[t, j]^2)`, float32 [in] for every matrix; N is `nsamples`.

    Wanda (arXiv 2306.11695) calls it `scaler_row`. A sample without a token counts as zeros.
    """

    name = "input_norm"
    axes = ("in",)

    def observe(self, matmul: Matmul) -> None:
        """Add the squares of the inputs; those of the last input again where it is the same."""
        if self._last is None or self._last[0] is not matmul.input:
            self._last = matmul.input, matmul.input_TI.float().square().sum(dim=0)
        squares_I = self._last[1]
        if matmul.slot in self._sums:
            self._sums[matmul.slot] += squares_I
        else:
            self._sums[matmul.slot] = squares_I.clone()

    def result(self, matrix: MatmulWeight) -> Tensor | None:
        """Return the norms, float32 [in]; None for an expert that saw no token."""
        if matrix not in self._sums:
            return None
        return (self._sums[matrix] / self._nsamples).sqrt()
