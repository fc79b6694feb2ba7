"""Gram matrix of the inputs of a matrix, for SparseGPT."""

from torch import Tensor

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic


class Gram(ActivationStatistic):
    """`(2/N) sum_n x_n^T x_n`, float32 [in, in] for every matrix; N is `nsamples`.

    Matrices that are multiplied with the same tensor (query, key and value; gate and up) share one.
    """

    name = "gram"
    axes = ("in", "in")
    shares_inputs = True

    def __init__(self, nsamples: int) -> None:
        super().__init__(nsamples)
        self._owner: dict[MatmulWeight, MatmulWeight] = {}

    @classmethod
    def flops_per_token(cls, out_features: int, in_features: int) -> int:
        """Return the FLOPs of a token's part of the matrix."""
        return 2 * in_features**2

    def observe(self, matmul: Matmul) -> None:
        """Add the product of the inputs with themselves."""
        shared = self._last is not None and self._last[0] is matmul.input
        owner = self._last[1] if shared and self._last is not None else matmul.slot
        if self._owner.setdefault(matmul.slot, owner) != owner:
            raise UnsupportedModel(
                f"{matmul.slot} shares its input in some samples only: such a model is not "
                f"followed here"
            )
        if shared:
            return
        self._last = (matmul.input, owner)
        input_TI = matmul.input_TI.float()
        gram_II = input_TI.T @ input_TI
        if owner in self._sums:
            self._sums[owner] += gram_II
        else:
            self._sums[owner] = gram_II

    def result(self, matrix: MatmulWeight) -> Tensor | None:
        """Return the gram matrix, float32 [in, in]; None for an expert that saw no token."""
        if matrix not in self._owner:
            return None
        return self._sums[self._owner[matrix]] * (2 / self._nsamples)
