"""The statistics of activations that a method can ask for, by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.sweeps.statistics.gram import Gram
from lowmem_gblm.sweeps.statistics.input_norm import InputNorm


class ActivationStatistic(Protocol):
    """A sum over calibration samples that needs the forward pass only."""

    name: str

    def observe(self, product: Matmul) -> None:
        """Called at every multiplication of a sample."""

    def finish_sample(self) -> None:
        """Called when a sample has passed."""

    def is_finite(self) -> bool:
        """Whether no sample so far was NaN or infinite."""

    def result(self, slot: MatmulWeight) -> Tensor | None:
        """The statistic of one slot, float32; None for an expert that saw no token."""


def activation_statistics(needs: Collection[str], nsamples: int) -> list[ActivationStatistic]:
    """Fresh accumulators for those of `needs` that activations give."""
    return [kind(nsamples) for kind in (InputNorm, Gram) if kind.name in needs]
