"""Prune one resident block: decisions from statistics, written into the tensors of the disk."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.methods import Decision, Method, Statistics
from lowmem_gblm.methods.masks import Pattern, count_nonzero, zero_removed
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.runtime.accelerator import synchronize
from lowmem_gblm.runtime.signals import StopFlag
from lowmem_gblm.sweeps.statistics import needed_statistics
from lowmem_gblm.sweeps.statistics.base import Measured
from lowmem_gblm.sweeps.statistics.finite import all_finite


@dataclass
class BlockPruner:
    """A pruner of blocks, and the record of its decisions.

    Attributes:
        patterns: By name on disk: what every tensor is pruned to.
        tensors: By name on disk: shape, zeros, layout, comparison groups.
        notes: What the method had to say.
        stop: Looked at before every matrix.
    """

    method: Method
    patterns: Mapping[str, Pattern]
    options: Any
    device: torch.device
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stop: StopFlag = field(default_factory=StopFlag)
    _told: tuple[int, int] = (0, 0)

    def journal_entry(self) -> dict[str, Any]:
        """Return the decisions since the last call, for the journal."""
        tensors, notes = self._told
        self._told = len(self.tensors), len(self.notes)
        return {"tensors": dict(list(self.tensors.items())[tensors:]), "notes": self.notes[notes:]}

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Take over the decisions of an earlier attempt."""
        self.tensors |= entry["tensors"]
        self.notes += entry["notes"]
        self._told = len(self.tensors), len(self.notes)

    def prune(
        self,
        block: Block,
        measured: Sequence[Measured],
        gradients: Iterable[Tensor | None],
    ) -> None:
        """Prune a block in place: `block.raw`, and its parameters alike.

        On a GPU all is done there, and the pruned matrices are copied to the host at the end.

        Args:
            measured: The statistics of activations.
            gradients: Gradient magnitudes of every matrix; empty where none are needed.

        Raises:
            NonFiniteError: A score or an updated weight of the named tensor is not finite.
        """
        kept: dict[str, list[Tensor]] = {}
        for weight, statistics in self.matrices(block, measured, gradients):
            counts = kept.setdefault(weight.name, [])
            counts.append(self._prune_matrix(block, weight, statistics))
            del statistics
        synchronize(self.device)
        self._record(block, {name: sum(map(int, counts)) for name, counts in kept.items()})

    def matrices(
        self,
        block: Block,
        measured: Sequence[Measured],
        gradients: Iterable[Tensor | None],
    ) -> Iterator[tuple[PrunableWeight, Statistics]]:
        """Yield every matrix of a block with its statistics, as `prune` takes them.

        Nothing here holds the statistics of a matrix while those of the next one arrive; the caller
        is not to hold them either.
        """
        derived: dict[object, Any] = {}
        arriving = iter(gradients)
        for weight in block.weights:
            self.stop.check()
            yield weight, self._statistics(weight, measured, next(arriving, None), derived)

    def _prune_matrix(self, block: Block, weight: PrunableWeight, given: Statistics) -> Tensor:
        """Prune one matrix of a block; return how many of its weights are not zero."""
        values_OI = block.on_device(weight, self.device)
        decision = self.decide(weight, values_OI, given)
        _apply(decision, values_OI)
        block.replace(weight, values_OI)
        if decision.weight is not None and not bool(all_finite(values_OI)):
            raise NonFiniteError(f"{weight}: updated weights overflow {values_OI.dtype}")
        return count_nonzero(values_OI)

    def decide(self, weight: PrunableWeight, values_OI: Tensor, given: Statistics) -> Decision:
        """Return the decision of the method about a matrix of the disk, and note what it notes."""
        pattern = self.patterns[weight.name]
        try:
            decision = self.method.decide(values_OI, given, pattern, self.options)
        except NonFiniteError as error:
            raise NonFiniteError(f"{weight}: {error}") from None
        if decision.note is not None:
            self.notes.append(f"{weight}: {decision.note}")
        return decision

    def _statistics(
        self,
        weight: PrunableWeight,
        measured: Sequence[Measured],
        gradient_OI: Tensor | None,
        derived: dict[object, Any],
    ) -> Statistics:
        """Return the statistics of a tensor: zeros for an expert that saw no token."""
        found = {one.name: one.part(weight) for one in measured}
        needed = needed_statistics(self.method.needs_with(self.options))
        if needed.gradient is not None:
            found[needed.gradient.name] = gradient_OI
            if gradient_OI is not None and not bool(gradient_OI.max()):
                self.notes.append(f"{weight}: all of its gradients are zero")
        values: dict[str, Tensor] = {}
        for kind in needed.classes:
            value = found[kind.name]
            if value is None:
                shape = kind.shape(weight.out_features, weight.in_features)
                if shape not in derived:
                    derived[shape] = torch.zeros(shape, device=self.device)
                value = derived[shape]
            values[kind.name] = value
        per_output = [kind.name for kind in needed.classes if kind.per_output()]
        return Statistics(values, per_output, derived)

    def _record(self, block: Block, kept: Mapping[str, int]) -> None:
        for weight in {weight.name: weight for weight in block.weights}.values():
            tensor = block.raw[weight.name]
            self.tensors[weight.name] = {
                "shape": list(tensor.shape),
                "zeros": tensor.numel() - kept[weight.name],
                "layout": "in,out" if weight.in_first_on_disk else "out,in",
                # Of every matrix of the tensor: `verify` counts zeros by them.
                "groups": self.method.comparison_groups(
                    self.patterns[weight.name], weight.out_features, weight.in_features
                ),
            }


def _apply(decision: Decision, target_OI: Tensor) -> None:
    """Write a decision into a matrix."""
    if decision.weight is not None:
        target_OI.copy_(decision.weight)
    zero_removed(target_OI, decision.keep)
