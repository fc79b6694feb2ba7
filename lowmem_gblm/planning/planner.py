"""Choosing how a run is done: the fastest way that fits the budget, exact ways first."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import isqrt

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.planning.memory_use import Footprint, footprints, peaks
from lowmem_gblm.planning.messages import reasons, refusal
from lowmem_gblm.planning.plan import Budget, Plan, Requirements
from lowmem_gblm.planning.run_time import MachineSpeed, disk_rate, run_time
from lowmem_gblm.planning.sizes import STORES, Choices, Workload, slices_within, stores
from lowmem_gblm.planning.steps import step_table
from lowmem_gblm.planning.totals import DiskUse, disk_use, read_bytes, step_flops, written_bytes

# More bytes than any machine has.
_UNLIMITED = 1 << 62


def plan(
    work: Workload,
    budget: Budget,
    *,
    speed: MachineSpeed | None = None,
    kept: Choices | None = None,
) -> Plan:
    """Choose how a run is done, and predict what it will take.

    Args:
        speed: Speed of the machine; without it there is no time in the plan.
        kept: Choices of an earlier attempt at the same job: what lies on the disk stays as it is.

    Raises:
        BudgetError: Nothing fits; names what is missing, and which smaller work would fit.
    """
    *_, frugal = _in_memory(work)
    leanest = footprints(work, frugal)
    minimum = _minimum(work, leanest, kept)
    found = _fitting(work, budget, kept)
    if found is not None:
        return _made(work, *found, minimum, speed)
    smaller = _smaller_work(work) if kept is None else ()
    fits = dict.fromkeys(option for option, other in smaller if _fitting(other, budget))
    raise BudgetError(refusal(work, minimum, leanest, budget, list(fits)))


def _fitting(
    work: Workload, budget: Budget, kept: Choices | None = None
) -> tuple[Choices, int] | None:
    """Return the fastest choices that fit, with the most exact way to store, and their `_room`."""
    for choices in _in_memory(work):
        if _left(work, choices, budget) is None:
            continue
        ways = list(_on_disk(work, choices))
        if kept is not None:
            if choices.durable_interval != kept.durable_interval:
                continue
            precision, interval = kept.gradient_precision, kept.boundary_interval
            ways = [replace(choices, gradient_precision=precision, boundary_interval=interval)]
        for way in ways:
            # What is held between durable steps depends on the boundaries that are kept.
            left = _left(work, way, budget)
            if left is None:
                continue
            stored = disk_use(work, way)
            # The journal counts on what it lists to be on the disk.
            room = _room(work, stored, left if kept is None else 0, budget)
            if not _exceeds(stored.on_disk(room), budget.disk_bytes):
                return way, room
    return None


def _left(work: Workload, choices: Choices, budget: Budget) -> int | None:
    """Return the host memory that a run leaves of its budget; None if its memory does not fit."""
    host, gpu = peaks(footprints(work, choices))
    if _exceeds(host, budget.host_bytes) or _exceeds(gpu, budget.gpu_bytes):
        return None
    return _UNLIMITED if budget.host_bytes is None else budget.host_bytes - host


def _room(work: Workload, stored: DiskUse, left: int, budget: Budget) -> int:
    """Return the host memory, of what is `left`, that holds what the disk is too small for.

    A run in host memory cannot be resumed, so one that overwrites its model only uses the disk.
    """
    missing = 0 if budget.disk_bytes is None else stored.on_disk(0) - budget.disk_bytes
    room = stored.room_for(missing) if missing > 0 and not work.rewrites else 0
    return min(room, left)


def _exceeds(needed: int, allowed: int | None) -> bool:
    return allowed is not None and needed > allowed


def _smaller_work(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield smaller work that could fit instead, each with the option to type for it."""
    seqlen, nsamples = work.seqlen // 2, work.nsamples // 2
    while work.schedule.needs_samples and seqlen >= 128:
        yield f"--seqlen {seqlen}", replace(work, seqlen=seqlen)
        seqlen //= 2
    while work.schedule.needs_samples and nsamples >= 8:
        yield work.samples_option.format(nsamples), replace(work, nsamples=nsamples)
        nsamples //= 2
    if work.on_gpu and work.resident_bits is None:
        yield "--compute-weights nf4", replace(work, resident_bits=4)


def _in_memory(work: Workload) -> Iterator[Choices]:
    """Yield the choices on memory, fastest first: a second pass over a block costs most."""
    two, block = 2 * work.boundary_bytes, sum(work.sizes.accumulators)
    behind = (max(block, two), two) if work.schedule.stores_gradients else (two,)
    ahead = [(True, True, behind[0])] if work.on_gpu and work.resident_bits is None else []
    ahead += [(False, True, size) for size in behind]
    ahead += [(False, True, 0), (False, False, 0)]
    durable = dict.fromkeys((durable_interval(work), 1))
    for limit, (copy, read, size), every in product(_limits(work), ahead, durable):
        yield Choices(
            read_ahead=read,
            copy_ahead=copy,
            behind_bytes=size,
            accumulator_bytes=limit,
            durable_interval=every,
        )


def durable_interval(work: Workload) -> int:
    """Return the interval of durable steps that writes little and repeats little: sqrt(depth).

    A GPU computes faster than most disks write: there, what only the next block reads stays in
    host memory if that suffices. In place every step is durable, as it overwrites a block.
    """
    if not work.on_gpu or work.rewrites or not work.schedule.needs_samples:
        return 1
    return max(1, isqrt(work.sizes.depth))


def _limits(work: Workload) -> list[int | None]:
    """Return the limits for accumulators: all at once, then in 2, 3, … parts."""
    if not work.schedule.keeps_boundaries:
        return [None]
    numbers = work.sizes.accumulators
    limits: list[int | None] = [None]
    for parts in range(2, len(numbers) + 1):
        limit = max(max(numbers), -(-sum(numbers) // parts))
        if limit != limits[-1] and len(slices_within(numbers, limit)) > 1:
            limits.append(limit)
        if limit == max(numbers):
            break
    return limits


def _on_disk(work: Workload, choices: Choices) -> Iterator[Choices]:
    """Yield the choices on disk space: exact precision first, then recomputed boundaries."""
    precisions = list(STORES) if stores(work, choices) else list(STORES)[:1]
    most = largest_interval(work.sizes.depth) if work.schedule.keeps_boundaries else 1
    for precision, interval in product(precisions, range(1, most + 1)):
        yield replace(choices, gradient_precision=precision, boundary_interval=interval)


def largest_interval(depth: int) -> int:
    """Return the largest interval of kept boundaries that is tried: none beyond it needs less disk.

    k boundaries of a segment and depth / k kept ones are fewest at the square root of the depth.
    """
    return min(depth, isqrt(max(0, depth - 1)) + 2)


def _minimum(work: Workload, leanest: Sequence[Footprint], kept: Choices | None) -> Requirements:
    ways = _on_disk(work, Choices()) if kept is None else [kept]
    disk = min(disk_use(work, way).on_disk(0) for way in ways)
    host, gpu = peaks(leanest)
    return Requirements(host_bytes=host, gpu_bytes=gpu, disk_bytes=disk)


def _made(
    work: Workload,
    choices: Choices,
    room: int,
    minimum: Requirements,
    speed: MachineSpeed | None,
) -> Plan:
    stored, passes = disk_use(work, choices), footprints(work, choices)
    host, gpu = peaks(passes)
    disk = stored.on_disk(room)
    return Plan(
        stages=work.schedule.stages,
        choices=choices,
        reasons=tuple(reasons(work, choices, stored, room)),
        predicted=Requirements(host_bytes=host + room, gpu_bytes=gpu, disk_bytes=disk),
        minimum=minimum,
        footprints=tuple(passes),
        host_spill_bytes=room,
        boundary_bytes=stored.boundaries,
        magnitude_bytes=stored.magnitudes,
        spill_bytes=stored.on_disk(0) if work.rewrites else max(0, stored.stored - room),
        output_bytes=work.sizes.total_bytes * work.writes,
        statistics_bytes=sum(work.saves),
        read_bytes=read_bytes(work, choices),
        written_bytes=written_bytes(work, choices),
        flops=sum(step_flops(step, work) for step in step_table(work, choices)),
        seconds=None if speed is None else run_time(work, choices, speed),
        disk_rate=None if speed is None else disk_rate(work, choices, speed),
    )
