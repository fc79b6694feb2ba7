"""Choosing how a run is done: the fastest way that fits the budget, exact ways first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.planning.disk_use import DiskUse, disk_use
from lowmem_gblm.planning.memory_use import Footprint, boundary_bytes, footprints
from lowmem_gblm.planning.messages import reasons, refusal
from lowmem_gblm.planning.plan import Budget, Plan, Requirements
from lowmem_gblm.planning.run_time import MachineSpeed, run_time
from lowmem_gblm.planning.sizes import (
    FLOAT32_BYTES,
    Choices,
    ModelSizes,
    Workload,
    slices_within,
    stores,
)
from lowmem_gblm.planning.steps import step_table
from lowmem_gblm.planning.totals import read_bytes, step_flops, written_bytes


def plan(
    sizes: ModelSizes,
    work: Workload,
    base_bytes: int,
    budget: Budget,
    *,
    speed: MachineSpeed | None = None,
    alternatives: Sequence[tuple[str, Workload]] = (),
    kept: Choices | None = None,
) -> Plan:
    """Choose how a run is done, and predict what it will take.

    Args:
        base_bytes: Resident memory of the process before any tensor is loaded.
        speed: Speed of the machine; without it there is no time in the plan.
        alternatives: Other work that a user could ask for instead, by what they would type.
        kept: Choices of an earlier attempt at the same job: what lies on the disk stays as it is.

    Raises:
        BudgetError: Nothing fits; names what is missing, and which alternative would fit.
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
    return _made(sizes, work, found, minimum, speed)


@dataclass(frozen=True)
class _Fitting:
    """Choices that fit, and what follows from them."""

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
            # The journal counts on what it lists to be on the disk.
            left = 0
        found = _stored_somewhere(sizes, work, ways, made, left, budget)
        if found is not None:
            return found
    return None


def _stored_somewhere(
    sizes: ModelSizes,
    work: Workload,
    ways: Sequence[Choices],
    made: list[Footprint],
    left: int | None,
    budget: Budget,
) -> _Fitting | None:
    """Return the most exact way to store boundaries and gradient magnitudes that fits, or None.

    They are stored on the disk; where it is too small, in the host memory that is `left`. A run in
    host memory cannot be resumed, so a run that overwrites its model only uses the disk.
    """
    for choices in ways:
        stored = disk_use(step_table(sizes, work, choices), sizes, work, choices)
        missing = 0 if budget.disk_bytes is None else stored.on_disk(0) - budget.disk_bytes
        room = stored.room_for(missing) if missing > 0 and not work.rewrites else 0
        if left is not None:
            room = min(room, left)
        if not _exceeds(stored.on_disk(room), budget.disk_bytes):
            return _Fitting(choices, made, stored, room)
    return None


def _exceeds(needed: int, allowed: int | None) -> bool:
    return allowed is not None and needed > allowed


def _in_memory(sizes: ModelSizes, work: Workload) -> Iterator[Choices]:
    """Yield the choices on memory, fastest first: a second pass over a block costs most."""
    one = boundary_bytes(sizes, work)
    whole = sum(sizes.slots) * FLOAT32_BYTES
    behind = (max(whole, 2 * one), 2 * one) if work.schedule.stores_gradients else (2 * one,)
    ahead = [(True, True, behind[0])] if work.on_gpu and work.resident_bits is None else []
    ahead += [(False, True, size) for size in behind]
    ahead += [(False, True, 0), (False, False, 0)]
    for limit, (copy, read, size) in product(_limits(sizes, work), ahead):
        yield Choices(read_ahead=read, copy_ahead=copy, behind_bytes=size, accumulator_bytes=limit)


def _limits(sizes: ModelSizes, work: Workload) -> list[int | None]:
    """Return the limits for accumulators: all at once, then in 2, 3, … parts."""
    if not work.schedule.keeps_boundaries:
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
    """Yield the choices on disk space: exact precision first, then recomputed boundaries."""
    kinds = work.stores if stores(work, choices) else work.stores[:1]
    most = largest_interval(sizes.depth) if work.schedule.keeps_boundaries else 1
    intervals = range(1, most + 1)
    for precision, interval in product(kinds, intervals):
        yield replace(choices, gradient_precision=precision, boundary_interval=interval)


def largest_interval(depth: int) -> int:
    """Return the largest interval of kept boundaries that is tried: none beyond it needs less disk.

    k boundaries of a segment and depth / k kept ones are fewest at the square root of the depth.
    """
    return min(depth, isqrt(max(0, depth - 1)) + 2)


def _frugal(sizes: ModelSizes, work: Workload) -> Choices:
    """Return the choices that take least memory."""
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
        disk_bytes=min(
            disk_use(step_table(sizes, work, way), sizes, work, way).on_disk(0) for way in ways
        ),
    )


def _made(
    sizes: ModelSizes,
    work: Workload,
    found: _Fitting,
    minimum: Requirements,
    speed: MachineSpeed | None,
) -> Plan:
    choices, stored = found.choices, found.disk_use
    predicted = Requirements(
        host_bytes=max(one.host_bytes for one in found.footprints) + found.room,
        gpu_bytes=max(one.gpu_bytes for one in found.footprints),
        disk_bytes=stored.on_disk(found.room),
    )
    table = step_table(sizes, work, choices)
    return Plan(
        stages=work.schedule.stages,
        choices=choices,
        reasons=tuple(reasons(sizes, work, choices, stored, found.room)),
        predicted=predicted,
        minimum=minimum,
        footprints=tuple(found.footprints),
        host_spill_bytes=found.room,
        boundary_bytes=stored.boundaries,
        magnitude_bytes=stored.magnitudes,
        spill_bytes=stored.on_disk(0) if work.rewrites else max(0, stored.stored - found.room),
        output_bytes=sizes.total_bytes * work.writes,
        read_bytes=read_bytes(table, sizes, work),
        written_bytes=written_bytes(table, sizes, work, choices),
        flops=sum(step_flops(step, sizes, work) for step in table),
        seconds=None if speed is None else run_time(table, sizes, work, choices, speed),
    )
