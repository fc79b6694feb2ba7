"""Reading the masks of outputs, one tensor at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from lowmem_gblm.commands.promised_groups import promised_groups
from lowmem_gblm.commands.report.kinds import Place, places
from lowmem_gblm.commands.report.outputs import Output
from lowmem_gblm.commands.report.structure import (
    Overlap,
    Structure,
    Sums,
    density,
    overlap,
    structure,
    total,
)
from lowmem_gblm.errors import VerificationError, shown
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.storage.checkpoint.file_access import RECORD

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The masks of one output.

    Attributes:
        tensors: The first tensor at every place, from the first block to the last.
        structures: By place, experts together.
        overlaps: With the first output, of what both have pruned; empty for that itself.
    """

    output: Output
    tensors: dict[Place, str] = field(default_factory=dict)
    structures: dict[Place, Structure] = field(default_factory=dict)
    overlaps: dict[Place, Overlap] = field(default_factory=dict)


def by_kind(values: Mapping[Place, Sums]) -> dict[str, Sums]:
    """Return the sums of every kind of matrix over all blocks."""
    found: dict[str, Sums] = {}
    for place, value in values.items():
        _add(found, place.kind, value)
    return found


def _add(sums: dict[Key, Sums], key: Key, value: Sums) -> None:
    sums[key] = sums[key] + value if key in sums else value


def measure(outputs: Sequence[Output], listener: Listener | None = None) -> list[Measured]:
    """Measure the masks of all outputs, and their overlaps with the first of them.

    In memory are the mask of a tensor in the first output, that in another one, and what is read
    of a file at a time.

    Raises:
        VerificationError: A tensor has not the zeros that its record counts.
    """
    measured = [Measured(output=one) for one in outputs]
    placed = places(name for one in outputs for name in one.record["tensors"])
    progress = Progress([Stage(name="masks", steps=len(placed), cost=1)], listener)
    with progress.stage("masks"):
        for name, place in sorted(placed.items(), key=lambda one: (one[1].block or 0, one[1].kind)):
            _measure_tensor(measured, name, place)
            progress.step()
    return measured


def _measure_tensor(measured: Sequence[Measured], name: str, place: Place) -> None:
    """Add the mask of one tensor in every output that has pruned it."""
    first_EOI = None
    for one in measured:
        if name not in one.output.record["tensors"]:
            continue
        one.tensors.setdefault(place, name)
        zero_EOI = zero_mask(one.output, name)
        groups = promised_groups(one.output.record["tensors"][name])
        found = total(structure(zero_OI, groups) for zero_OI in zero_EOI)
        _add(one.structures, place, found)
        if one is measured[0]:
            first_EOI = zero_EOI
        elif first_EOI is not None:
            pairs = zip(first_EOI, zero_EOI, strict=True)
            _add(one.overlaps, place, total(overlap(zero, other) for zero, other in pairs))


def zero_mask(output: Output, name: str) -> Tensor:
    """Return where a tensor is zero, bool [experts, out, in]; a single matrix is one expert."""
    entry, described = output.checkpoint.tensors[name], output.record["tensors"][name]
    zero = torch.empty(entry.shape, dtype=torch.bool)
    flat, start = zero.view(-1), 0
    for piece in output.checkpoint.pieces(name):
        values = torch.frombuffer(piece, dtype=entry.dtype)
        torch.eq(values, 0, out=flat[start : start + len(values)])
        start += len(values)
    if (found := numpy.count_nonzero(zero.numpy())) != described["zeros"]:
        raise VerificationError(
            f"{shown(name)} in {output.path} has {found} zeros, {RECORD} says "
            f"{described['zeros']}: it was changed after it was pruned"
        )
    matrices = zero.view(-1, *entry.shape[-2:])
    return matrices.mT if described["layout"] == "in,out" else matrices


def representatives(measured: Measured) -> list[Place]:
    """Return for every kind the place where columns are dispersed as the median of the kind."""
    found: dict[str, list[Place]] = {}
    for place in measured.structures:
        found.setdefault(place.kind, []).append(place)
    return [_median(measured, alike) for alike in found.values()]


def _median(measured: Measured, alike: Sequence[Place]) -> Place:
    ranked = sorted(alike, key=lambda place: measured.structures[place].columns.dispersion or 0)
    return ranked[len(ranked) // 2]


def picture(measured: Measured, place: Place, longest: int) -> Tensor | None:
    """Return the `density` of the first matrix at a place; None if it is not pruned."""
    if place not in measured.tensors:
        return None
    return density(zero_mask(measured.output, measured.tensors[place])[0], longest)
