"""Which sweeps a run makes, derived from what the method needs."""

from dataclasses import dataclass
from typing import Literal

Activations = Literal["pruned", "dense"]
Stage = Literal["embed", "dry_run", "dense", "head", "reverse", "search", "choose", "prune"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The stages of a run, in order.

    Attributes:
        stages: "embed" runs where samples are run at all; "dense" and "head" prepare "reverse"; a
            run that prunes has "reverse", "prune" or both. "search" and "choose" come before
            "prune" where an option of the method is chosen among candidates. "dry_run" runs in
            place, if "dense" does not.
        prune_in: The stage in which blocks are pruned and written; None for an evaluation.
        prune_forwards: Forward passes over every sample within "prune": 0 where the method needs no
            activations, 1 where statistics and next boundary come from the same dense forward, 2
            where the pruned block is run again for the next boundary.
    """

    stages: tuple[Stage, ...]
    prune_in: Literal["reverse", "prune"] | None = None
    prune_forwards: int = 0

    @property
    def needs_samples(self) -> bool:
        """Return whether calibration samples are run at all."""
        return "embed" in self.stages

    @property
    def evaluates(self) -> bool:
        """Return whether nothing is pruned: losses are all that comes of the run."""
        return self.prune_in is None

    @property
    def stores_gradients(self) -> bool:
        """Return whether the gradient magnitudes of all blocks are stored between two sweeps."""
        return {"reverse", "prune"} <= set(self.stages)

    @property
    def keeps_boundaries(self) -> bool:
        """Return whether the dense sweep keeps boundaries for the reverse sweep."""
        return "reverse" in self.stages


EVALUATION = Schedule(stages=("embed", "dense", "head"))


def schedule(
    activations: Activations,
    *,
    needs_backward: bool,
    needs_forward: bool,
    in_place: bool = False,
    searches: bool = False,
) -> Schedule:
    """Return the stages for a method that needs statistics of gradients, of activations, or both.

    Gradients are always those of the dense model. Activations are those of the model pruned so far
    (`pruned`), which takes a sweep of its own from first to last block, or of the dense model
    (`dense`), which a sweep that runs anyway can measure. In place, all blocks are read before one
    is overwritten. A run that `searches` prunes last, with the options that it has chosen.
    """
    backward: tuple[Stage, ...] = ("dense", "head", "reverse") if needs_backward else ()
    first: tuple[Stage, ...] = backward or (("dry_run",) if in_place else ())
    if needs_backward and not searches and (activations == "dense" or not needs_forward):
        return Schedule(stages=("embed", *backward), prune_in="reverse")
    embed: tuple[Stage, ...] = ("embed",) if needs_backward or needs_forward or searches else ()
    search: tuple[Stage, ...] = ("search", "choose") if searches else ()
    forwards = 0
    if needs_forward:
        forwards = 1 if activations == "dense" else 2
    stages = (*embed, *first, *search, "prune")
    return Schedule(stages=stages, prune_in="prune", prune_forwards=forwards)
