"""Choosing how a run is done: the fastest way that fits the budget, exact ways first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.planning.disk_use import DiskUse, disk_use
from lowmem_gblm.planning.memory_use import Footprint, boundary_bytes, footprints
from lowmem_gblm.planning.messages import reasons, refusal
from lowmem_gblm.planning.plan import Budget, Plan, Requirements
from lowmem_gblm.planning.run_time import Speeds, durations
from lowmem_gblm.planning.schedule import reverse_order
from lowmem_gblm.planning.sizes import (
    FLOAT32_BYTES,
    Choices,
    ModelSizes,
    Workload,
    slices_within,
    stored_bytes,
    stores,
)


def plan(
    sizes: ModelSizes,
    work: Workload,
    base_bytes: int,
    budget: Budget,
    *,
    speeds: Speeds | None = None,
    alternatives: Sequence[tuple[str, Workload]] = (),
    kept: Choices | None = None,
) -> Plan:
    """Choose how a run is done, and predict what it will take.

    Args:
        sizes: Of the model.
        work: To be done.
        base_bytes: Resident memory of the process before any tensor is loaded.
        budget: What may be used.
        speeds: Of the machine; without them there is no time in the plan.
        alternatives: Other work that a person could ask for instead, by what they would type.
        kept: Choices of an earlier attempt at the same job: what lies on the disk stays as it is.

    Raises:
        BudgetError: Nothing fits: says what is missing, and which alternative would fit.
    """
    found = _fitting(sizes, work, base_bytes, budget, kept)
    minimum = _minimum(sizes, work, base_bytes, kept)
    if found is None:
        fits = [
            option
            for option, other in alternatives
            if kept is None and _fitting(sizes, other, base_bytes, budget)
        ]
        leanest = footprints(sizes, work, _frugal(sizes, work), base_bytes)
        raise BudgetError(refusal(work, minimum, leanest, budget, sizes, fits))
    return _made(sizes, work, found, minimum, speeds)


@dataclass(frozen=True)
class _Fitting:
    """Choices that fit, and what comes of them."""

    choices: Choices
    footprints: list[Footprint]
    disk_use: DiskUse
    room: int


def _fitting(
    sizes: ModelSizes, work: Workload, base_bytes: int, budget: Budget, kept: Choices | None = None
) -> _Fitting | None:
    for choices in _in_memory(sizes, work):
        made = footprints(sizes, work, choices, base_bytes)
        host = max(one.host_bytes for one in made)
        gpu = max(one.gpu_bytes for one in made)
        if _exceeds(host, budget.host_bytes) or _exceeds(gpu, budget.gpu_bytes):
            continue
        left = None if budget.host_bytes is None else budget.host_bytes - host
        ways = list(_on_disk(sizes, work, choices))
        if kept is not None:
            ways = [
                replace(
                    choices,
                    gradient_precision=kept.gradient_precision,
                    boundary_interval=kept.boundary_interval,
                )
            ]
            # The journal counts on what it has written down to be on the disk.
            left = 0
        found = _waiting_somewhere(sizes, work, ways, made, left, budget)
        if found is not None:
            return found
    return None


def _waiting_somewhere(
    sizes: ModelSizes,
    work: Workload,
    ways: Sequence[Choices],
    made: list[Footprint],
    left: int | None,
    budget: Budget,
) -> _Fitting | None:
    """Where boundaries and gradient magnitudes can wait, in the most exact way that fits.

    That is the disk; host memory, of which so much is left over, where the disk does not suffice.
    Then nothing can be resumed, which a run that overwrites its model must be.
    """
    for choices in ways:
        waits = disk_use(sizes, work, choices)
        missing = 0 if budget.disk_bytes is None else waits.on_disk(0) - budget.disk_bytes
        room = waits.room_for(missing) if missing > 0 and not work.rewrites else 0
        if left is not None:
            room = min(room, left)
        if not _exceeds(waits.on_disk(room), budget.disk_bytes):
            return _Fitting(choices, made, waits, room)
    return None


def _exceeds(needed: int, allowed: int | None) -> bool:
    return allowed is not None and needed > allowed


def _in_memory(sizes: ModelSizes, work: Workload) -> Iterator[Choices]:
    """What concerns memory, fastest first: a second pass over a block costs most."""
    one = boundary_bytes(sizes, work)
    whole = sum(sizes.slots) * FLOAT32_BYTES
    behind = (max(whole, 2 * one), 2 * one) if work.stores_gradients else (2 * one,)
    ahead = [(True, True, behind[0])] if work.on_gpu and work.resident_bits is None else []
    ahead += [(False, True, size) for size in behind]
    ahead += [(False, True, 0), (False, False, 0)]
    for limit, (copy, read, size) in product(_limits(sizes, work), ahead):
        yield Choices(read_ahead=read, copy_ahead=copy, behind_bytes=size, accumulator_bytes=limit)


def _limits(sizes: ModelSizes, work: Workload) -> list[int | None]:
    """Limits for accumulators: all at once, then in 2, 3, … parts."""
    if "gradient" not in work.needs:
        return [None]
    numbers = [weights * FLOAT32_BYTES for weights in sizes.slots]
    limits: list[int | None] = [None]
    for parts in range(2, len(numbers) + 1):
        limit = max(max(numbers), -(-sum(numbers) // parts))
        if limit != limits[-1] and len(slices_within(numbers, limit)) > 1:
            limits.append(limit)
        if limit == max(numbers):
            break
    return limits


def _on_disk(sizes: ModelSizes, work: Workload, choices: Choices) -> Iterator[Choices]:
    """What concerns the work folder: exact precision first, then boundaries computed again."""
    kinds = work.stores if stores(work, choices) else work.stores[:1]
    steps = range(1, sizes.depth + 1) if work.keeps_boundaries else range(1, 2)
    for precision, interval in product(kinds, steps):
        yield replace(choices, gradient_precision=precision, boundary_interval=interval)


def _frugal(sizes: ModelSizes, work: Workload) -> Choices:
    """The choices that take least memory."""
    *_, last = _in_memory(sizes, work)
    return last


def _minimum(
    sizes: ModelSizes, work: Workload, base_bytes: int, kept: Choices | None
) -> Requirements:
    leanest = footprints(sizes, work, _frugal(sizes, work), base_bytes)
    ways = _on_disk(sizes, work, Choices()) if kept is None else [kept]
    return Requirements(
        host_bytes=max(one.host_bytes for one in leanest),
        gpu_bytes=max(one.gpu_bytes for one in leanest),
        disk_bytes=min(disk_use(sizes, work, choices).on_disk(0) for choices in ways),
    )


def _made(
    sizes: ModelSizes, work: Workload, found: _Fitting, minimum: Requirements, speeds: Speeds | None
) -> Plan:
    choices, waits = found.choices, found.disk_use
    predicted = Requirements(
        host_bytes=max(one.host_bytes for one in found.footprints) + found.room,
        gpu_bytes=max(one.gpu_bytes for one in found.footprints),
        disk_bytes=waits.on_disk(found.room),
    )
    again = again_fraction(sizes, work, choices)
    return Plan(
        passes=work.schedule.passes,
        choices=choices,
        reasons=tuple(reasons(sizes, work, choices, waits, found.room)),
        predicted=predicted,
        minimum=minimum,
        footprints=tuple(found.footprints),
        host_spill_bytes=found.room,
        boundary_bytes=waits.boundaries,
        magnitude_bytes=waits.magnitudes,
        spill_bytes=waits.on_disk(0) if work.rewrites else max(0, waits.together - found.room),
        output_bytes=sizes.total_bytes * work.writes,
        read_bytes=_read(sizes, work, again),
        written_bytes=_written(sizes, work, choices, again),
        flops=_flops(sizes, work, choices, again),
        seconds=None if speeds is None else durations(sizes, work, choices, speeds),
    )


def again_fraction(sizes: ModelSizes, work: Workload, choices: Choices) -> float:
    """Share of the blocks that run forward once more for boundaries that were not kept."""
    if not work.keeps_boundaries:
        return 0.0
    order = reverse_order(sizes.depth, choices.boundary_interval)
    return sum(not step.backward for step in order) / sizes.depth


def _read(sizes: ModelSizes, work: Workload, again: float) -> int:
    """Blocks once per pass; the rest to embed, for the head, and to copy what is not pruned.

    In place, everything once more at the end, for the hashes of the shards.
    """
    in_blocks = sum(sizes.block_bytes)
    rest = sizes.rest_bytes * sum(name in ("embed", "head") for name in work.schedule.passes)
    copied = (sizes.total_bytes - in_blocks) * work.writes
    checked = sizes.total_bytes * work.rewrites
    return int((work.schedule.reads + again) * in_blocks) + rest + copied + checked


def _written(sizes: ModelSizes, work: Workload, choices: Choices, again: float) -> int:
    """The output, every boundary, and the gradient magnitudes where they wait."""
    written = {"embed": 1, "dense": sizes.depth, "head": 1, "reverse": sizes.depth * (1 + again)}
    if work.schedule.prune_forwards:
        written["prune"] = sizes.depth
    boundaries = sum(written.get(name, 0) for name in work.schedule.passes)
    one = work.nsamples * boundary_bytes(sizes, work)
    stored = stored_bytes(sum(sizes.prunable), choices.gradient_precision) * work.stores_gradients
    blocks = 2 * sum(sizes.block_bytes) * work.rewrites
    return sizes.total_bytes * work.writes + blocks + int(boundaries * one) + stored


def _flops(sizes: ModelSizes, work: Workload, choices: Choices, again: float) -> int:
    tokens = work.nsamples * work.seqlen
    weights = sum(sizes.prunable) * sizes.active_fraction
    numbers = [count * FLOAT32_BYTES for count in sizes.slots]
    slices = len(slices_within(numbers, choices.accumulator_bytes))
    per_weight = work.schedule.flops_per_parameter_and_token + 2 * again + 4 * (slices - 1)
    return int(per_weight * weights * tokens)
