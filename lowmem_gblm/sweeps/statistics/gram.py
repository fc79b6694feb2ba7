"""Gram matrix of the inputs of a matrix, for SparseGPT."""

from torch import Tensor

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic

# Rows of the product that are held beside the sum, which is as large, on a GPU.
_ROWS_ON_GPU = 2048


class Gram(ActivationStatistic):
    """`(2/N) sum_n x_n^T x_n`, float32 [in, in] for every matrix; N is `nsamples`.

    Matrices that are multiplied with the same tensor (query, key and value; gate and up) share one.
    """

    name = "gram"
    axes = ("in", "in")
    shares_inputs = True
    result_is_sum = True

    def __init__(self, nsamples: int) -> None:
        super().__init__(nsamples)
        self._owner: dict[MatmulWeight, MatmulWeight] = {}
        self._scaled: set[MatmulWeight] = set()

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
        if owner not in self._sums:
            self._sums[owner] = input_TI.T @ input_TI
            return
        rows = input_TI.shape[1] if input_TI.is_cpu else _ROWS_ON_GPU
        for start in range(0, input_TI.shape[1], rows):
            part = slice(start, start + rows)
            self._sums[owner][part] += input_TI[:, part].T @ input_TI

    def result(self, matrix: MatmulWeight) -> Tensor | None:
        """Return the gram matrix, float32 [in, in]; None for an expert that saw no token.

        It is the sum itself, scaled: nothing can be added any more.
        """
        owner = self._owner.get(matrix)
        if owner is None:
            return None
        if owner not in self._scaled:
            self._sums[owner] *= 2 / self._nsamples
            self._scaled.add(owner)
        return self._sums[owner]
