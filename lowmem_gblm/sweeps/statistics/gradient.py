"""Magnitude of the gradients of single samples, without ever creating a `.grad`.

The weights are frozen. A hook on the output of each multiplication takes the gradient that arrives
there; its product with the input is the sample's gradient of the weight.
"""

from collections import Counter
from collections.abc import Callable, Collection
from typing import ClassVar

import torch
from torch import Tensor

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.base import GradientStatistic

# Numbers of a gradient that are worked on at once: on a CPU, what stays in its cache.
TILE, TILE_ON_GPU = 1 << 19, 1 << 23
_ROWS_ON_GPU = 256


def loss_scale(dtype: torch.dtype, seqlen: int) -> float:
    """Return the factor of the loss that keeps gradients from vanishing in the dtype.

    The mean over T tokens makes every gradient a T-th of what a token contributes; in float16 a
    third of the gradients would round to zero at T = 2048. The factor is a power of two near T.
    """
    return float(2 ** (seqlen.bit_length() - 1)) if dtype == torch.float16 else 1.0


class Gradient(GradientStatistic):
    """Sum over samples of a magnitude of their gradients, for every matrix as it is stored.

    A weight that is used several times in one sample has its gradients summed before the magnitude
    is taken. GBLM-Pruner (arXiv 2311.04902) divides by nothing: the sum grows with N. With
    `squares`, squares are summed, and the root is taken of the sum.
    """

    squares: ClassVar[bool]

    def __init__(
        self, scale: float = 1.0, matrices: Collection[MatmulWeight] | None = None
    ) -> None:
        super().__init__(scale, matrices)
        self._awaited: Counter[MatmulWeight] = Counter()
        self._partial: dict[MatmulWeight, Tensor] = {}

    def observe(self, matmul: Matmul) -> None:
        """Await the gradient of the output."""
        slot, input_TI = matmul.slot, matmul.input_TI
        if self._wanted is not None and slot not in self._wanted:
            return
        version = input_TI._version
        self._awaited[slot] += 1

        def arrive(gradient: Tensor) -> None:
            # Frozen weights take this check away from autograd.
            if input_TI._version != version:
                raise UnsupportedModel(f"the input of {slot} is changed after it was multiplied")
            gradient_TO = gradient.reshape(-1, gradient.shape[-1])
            # The order of the factors is autograd's own, so that the bits agree with it.
            if slot.in_first:
                self._arrive(slot, input_TI, gradient_TO)
            else:
                self._arrive(slot, gradient_TO, input_TI)

        matmul.out.register_hook(arrive)

    def finish_sample(self) -> None:
        """Add the gradients of weights some of whose products did not reach the loss."""
        for slot in list(self._partial):
            self._fold(slot)
        self._awaited.clear()

    def result(self, matrix: MatmulWeight) -> Tensor | None:
        """Move out the magnitudes of a matrix, float32, as it is stored; None without a token."""
        total = self._sums.pop(matrix, None)
        if total is None:
            return None
        if self.squares:
            total.sqrt_()
        total /= self._scale
        return total

    def _arrive(self, slot: MatmulWeight, left_TR: Tensor, right_TC: Tensor) -> None:
        """Take in one product's part of a sample's gradient: `left^T @ right`, as it is stored."""
        self._awaited[slot] -= 1
        earlier = self._partial.pop(slot, None)
        if earlier is None and not self._awaited[slot]:
            self._accumulate(slot, left_TR, right_TC)
            return
        gradient = left_TR.T @ right_TC
        self._partial[slot] = gradient if earlier is None else earlier + gradient
        if not self._awaited[slot]:
            self._fold(slot)

    def _accumulate(self, slot: MatmulWeight, left_TR: Tensor, right_TC: Tensor) -> None:
        """Add the magnitude of a complete gradient, a few rows at a time to stay in cache."""
        rows, columns = left_TR.shape[1], right_TC.shape[1]
        sums, put = self._sums_of(slot, (rows, columns), left_TR.device)
        step = max(1, (TILE if left_TR.is_cpu else TILE_ON_GPU) // columns)
        if not left_TR.is_cpu:
            # Tensor cores want rows that begin at multiples of 16 bytes.
            step = step // _ROWS_ON_GPU * _ROWS_ON_GPU or step
        for start in range(0, rows, step):
            part = slice(start, start + step)
            put(sums[part], self._magnitude(left_TR[:, part].T @ right_TC))

    def _fold(self, slot: MatmulWeight) -> None:
        """Add the magnitude of a gradient that came in parts."""
        gradient = self._partial.pop(slot)
        sums, put = self._sums_of(slot, tuple(gradient.shape), gradient.device)
        put(sums, self._magnitude(gradient))

    def _sums_of(
        self, slot: MatmulWeight, shape: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Return the sums of a matrix, and how to put a magnitude there: the first is copied."""
        if slot in self._sums:
            return self._sums[slot], Tensor.add_
        self._sums[slot] = torch.empty(shape, dtype=torch.float32, device=device)
        return self._sums[slot], Tensor.copy_

    def _magnitude(self, gradient: Tensor) -> Tensor:
        if self.boost != 1:
            gradient = gradient.float() * self.boost
        # Not `addcmul_`: it rounds once where this rounds twice.
        return gradient.float().square_() if self.squares else gradient.abs_()


class GradientL1(Gradient):
    """`sum_n |g_n|`."""

    name = "gradient_l1"
    squares = False


class GradientL2(Gradient):
    """`sqrt(sum_n g_n^2)`."""

    name = "gradient_l2"
    squares = True
