"""Which passes run, derived from what the method needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Activations = Literal["pruned", "dense"]
Pass = Literal["embed", "dry_run", "dense", "head", "reverse", "prune"]

# FLOPs of a pass in units of (parameters in blocks) x (tokens): a forward takes 2, a backward for
# the hidden states 2, the gradients of the weights 2.
_FORWARD = 2
_BACKWARD = 4


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The passes of a run, in order.

    Attributes:
        passes: Their names. "embed" runs where samples are run at all; "dense" and "head" prepare
            "reverse"; a run has "reverse", "prune" or both. "dry_run" runs in place, where "dense"
            does not.
        prune_in: The pass in which blocks are pruned and written.
        prune_forwards: Forward passes over every sample within "prune": 0 where the method needs
            no activations, 1 where statistics and next boundary come from the same dense forward,
            2 where the pruned block is run again for the next boundary.
    """

    passes: tuple[Pass, ...]
    prune_in: Literal["reverse", "prune"]
    prune_forwards: int

    @property
    def needs_samples(self) -> bool:
        """Whether calibration samples are run at all."""
        return "embed" in self.passes

    @property
    def reads(self) -> int:
        """How often every decoder block is read."""
        return len({"dry_run", "dense", "reverse", "prune"} & set(self.passes))

    @property
    def flops_per_parameter_and_token(self) -> int:
        """2 per multiplication with a weight, over the whole run."""
        return sum(self.flop_shares.values())

    @property
    def flop_shares(self) -> dict[str, int]:
        """The same by pass; passes that multiply with no weight of a block are left out."""
        shares = {
            "dense": _FORWARD,
            "reverse": _FORWARD + _BACKWARD,
            "prune": _FORWARD * self.prune_forwards,
        }
        return {name: share for name, share in shares.items() if name in self.passes}


@dataclass(frozen=True)
class Step:
    """One stay of a block in the reverse sweep: forward only, or forward and backward."""

    block: int
    backward: bool


def reverse_order(depth: int, boundary_interval: int) -> list[Step]:
    """The blocks of the reverse sweep where only boundaries 0, k, 2k, … were kept.

    Segment by segment from the last one: forward through all of its blocks but the last, for the
    boundaries in between; then backward through all of them. With k = 1 there is nothing to do
    again.
    """
    steps = []
    for start in range(
        (depth - 1) // boundary_interval * boundary_interval, -1, -boundary_interval
    ):
        stop = min(start + boundary_interval, depth)
        steps += [Step(block, backward=False) for block in range(start, stop - 1)]
        steps += [Step(block, backward=True) for block in range(stop - 1, start - 1, -1)]
    return steps


def schedule(
    needs: Collection[str], activations: Activations, *, in_place: bool = False
) -> Schedule:
    """The passes for a method that needs these statistics.

    Gradients are always those of the dense model. Activations are those of the model pruned so far
    (`pruned`), which takes a sweep of its own from first to last block, or of the dense model
    (`dense`), which a sweep that runs anyway can measure.

    In place, all blocks are read before one is overwritten.
    """
    gradient = "gradient" in needs
    activation = bool({"input_norm", "gram"} & set(needs))
    backward: tuple[Pass, ...] = ("dense", "head", "reverse") if gradient else ()
    first: tuple[Pass, ...] = backward or (("dry_run",) if in_place else ())
    if gradient and (activations == "dense" or not activation):
        return Schedule(passes=("embed", *backward), prune_in="reverse", prune_forwards=0)
    if not activation:
        return Schedule(passes=(*first, "prune"), prune_in="prune", prune_forwards=0)
    forwards = 1 if activations == "dense" else 2
    return Schedule(passes=("embed", *first, "prune"), prune_in="prune", prune_forwards=forwards)
