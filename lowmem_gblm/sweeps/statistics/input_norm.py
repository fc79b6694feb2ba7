"""Norm of the inputs of a matrix: averaged over samples, summed over tokens."""

from collections.abc import Mapping

from torch import Tensor

from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from lowmem_gblm.sweeps.statistics.finite import are_finite


class InputNorm(ActivationStatistic):
    """`sqrt((1/N) sum_n sum_t x_n[t, j]^2)`, float32 [in] for every matrix; N is `nsamples`.

    Wanda (arXiv 2306.11695) calls it `scaler_row`. For an expert, a sample without a token is
    zeros.
    """

    name = "input_norm"
    axes = ("in",)

    def __init__(self, nsamples: int) -> None:
        super().__init__(nsamples)
        self._squares: dict[MatmulWeight, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def observe(self, matmul: Matmul) -> None:
        """Add the squares of the inputs."""
        squares_I = self._squares_of(matmul)
        if matmul.slot in self._squares:
            self._squares[matmul.slot] += squares_I
        else:
            self._squares[matmul.slot] = squares_I.clone()

    def _squares_of(self, matmul: Matmul) -> Tensor:
        """Return sums of squares; those of the last input again where it is the same tensor."""
        if self._last is None or self._last[0] is not matmul.input:
            self._last = matmul.input, matmul.input_TI.float().square().sum(dim=0)
        return self._last[1]

    def finish_sample(self) -> None:
        """Release the last input."""
        self._last = None

    def sums(self) -> Mapping[MatmulWeight, Tensor]:
        """Return the sums of squares."""
        return self._squares

    def is_finite(self) -> bool:
        """Return whether no sample so far was NaN or infinite."""
        return are_finite(self._squares.values())

    def result(self, matrix: MatmulWeight) -> Tensor | None:
        """Return the norms, float32 [in]; None for an expert that saw no token."""
        if matrix not in self._squares:
            return None
        return (self._squares[matrix] / self._nsamples).sqrt()
