"""The statistics of a resident block as they are saved for later runs, and taken from earlier ones.

A statistic of a matrix is stored under the name of the matrix on disk and its own, as in
`model.layers.0.mlp.up_proj.weight/gradient_l1`. Gradient magnitudes may be rounded (`packing`); all
other statistics are float32. An expert that saw no token has zeros, as a decision would take it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.planning.sizes import GradientPrecision
from lowmem_gblm.storage.statistics_folder import StatisticsFolder, StatisticsWriter, TensorLayout
from lowmem_gblm.sweeps.statistics import NeededStatistics, StatisticClass
from lowmem_gblm.sweeps.statistics.base import GradientStatistic, Measured
from lowmem_gblm.sweeps.statistics.packing import pack, packed, unpack


def saved_layout(
    weights: Iterable[PrunableWeight],
    kinds: Sequence[StatisticClass],
    precision: GradientPrecision,
) -> TensorLayout:
    """Return the tensors that hold these statistics of matrices, in the order they are saved in."""
    return {
        name: described
        for weight in weights
        for kind in kinds
        for name, described in _layout(weight, kind, precision).items()
    }


@dataclass(frozen=True, kw_only=True)
class StatisticsSaver:
    """A saver of the statistics of resident blocks."""

    writer: StatisticsWriter
    statistics: NeededStatistics
    precision: GradientPrecision

    def save(
        self,
        block: Block,
        measured: Sequence[Measured],
        gradients: Iterable[Tensor | None],
        check: Callable[[], None],
    ) -> None:
        """Save what a block is pruned by; `check` may raise to stop."""
        layout = saved_layout(block.weights, self.statistics.classes, self.precision)
        tensors = self._tensors(block, measured, iter(gradients))
        self.writer.write_block(block.index, layout, tensors, check)

    def _tensors(
        self, block: Block, measured: Sequence[Measured], gradients: Iterator[Tensor | None]
    ) -> Iterator[Tensor]:
        parts: dict[str, Measured] = {one.name: one for one in measured}
        for weight in block.weights:
            for kind in self.statistics.classes:
                found = parts[kind.name].part(weight) if kind.name in parts else next(gradients)
                if found is None:
                    found = torch.zeros(kind.shape(weight.out_features, weight.in_features))
                if issubclass(kind, GradientStatistic):
                    yield from pack(found, self.precision)
                else:
                    yield found


@dataclass(frozen=True, kw_only=True)
class TakenStatistics:
    """The statistics that are taken from an earlier run; `folder` is None if none are.

    `precision` is that of gradient magnitudes.
    """

    statistics: NeededStatistics
    folder: StatisticsFolder | None
    precision: GradientPrecision
    device: torch.device

    @property
    def activations(self) -> list[Measured]:
        """Return the statistics of activations."""
        return [_TakenActivation(self, kind) for kind in self.statistics.activations]

    @property
    def bytes_read(self) -> int:
        """Return the bytes read so far."""
        return 0 if self.folder is None else self.folder.bytes_read

    def gradients_of(self, block: Block) -> Iterator[Tensor]:
        """Yield the gradient magnitudes of every matrix, float32 [out, in], on the device."""
        if self.statistics.gradient is not None:
            for weight in block.weights:
                yield self.read(self.statistics.gradient, weight)

    def read(self, kind: StatisticClass, weight: PrunableWeight) -> Tensor:
        """Return a statistic of a matrix, float32, on the device."""
        assert self.folder is not None, "no statistics are taken"
        names = _layout(weight, kind, self.precision)
        parts = [self.folder.read(name).to(self.device) for name in names]
        shape = kind.shape(weight.out_features, weight.in_features)
        return unpack(parts, _precision(kind, self.precision), shape)


@dataclass(frozen=True)
class _TakenActivation:
    """One statistic of activations, of all blocks."""

    taken: TakenStatistics
    kind: StatisticClass

    @property
    def name(self) -> str:
        return self.kind.name

    def part(self, weight: PrunableWeight) -> Tensor:
        return self.taken.read(self.kind, weight)


def _layout(
    weight: PrunableWeight, kind: StatisticClass, precision: GradientPrecision
) -> TensorLayout:
    shape = kind.shape(weight.out_features, weight.in_features)
    return packed(f"{weight}/{kind.name}", _precision(kind, precision), shape)


def _precision(kind: StatisticClass, precision: GradientPrecision) -> GradientPrecision:
    """Return in which precision a statistic is saved, where magnitudes are saved in `precision`."""
    return precision if issubclass(kind, GradientStatistic) else "float32"
