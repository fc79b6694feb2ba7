"""The table of steps: what every step of a run reads, writes and drops in the work folder.

The plan adds the table up (disk use is its running sum, FLOPs and bytes are its totals), the sweeps
walk it, the journal records its finished rows, progress groups it by stage, and what is left of an
interrupted run is its tail.

    embed    writes boundary 0
    dry_run  reads boundary 0; runs in place only, before a block is overwritten
    dense    block i: reads boundary i of the dense stream, writes boundary i + 1
    head     reads the last boundary, writes the gradient of the loss at it
    reverse  block i, backward: reads boundary i and the loss gradient at i + 1, writes the loss
             gradient at i and the gradient magnitudes of the block; block i, forward only: computes
             boundary i + 1 again, which was not kept
    search   block i: reads boundary i of the dense stream, that of held-out windows in the model of
             every candidate, and the gradient magnitudes; writes both boundaries i + 1
    choose   reads the last boundary of the held-out windows
    prune    block i: reads boundary i of the pruned stream and the gradient magnitudes, writes
             boundary i + 1 and the pruned block

A step that prunes a block also saves its statistics for later runs, or takes what an earlier run
has saved, if that is asked for.

`Step.drops` follows from who reads what (`_with_drops`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lowmem_gblm.planning.keys import (
    Key,
    Stream,
    boundary,
    loss_gradient,
    magnitudes,
    trial,
)
from lowmem_gblm.planning.schedule import Schedule, Stage
from lowmem_gblm.planning.sizes import Choices, Workload, slices_within


@dataclass(frozen=True, kw_only=True)
class Step:
    """The work between two entries of the journal.

    Attributes:
        block: The decoder block that is resident; None where none or every one is.
        part: Matrices of the block that the step prunes; "" for all of them.
        reads, writes: What the step reads from the work folder, and writes to it.
        durable: Whether a resumed run can begin after the step.
        held: What of `writes` is held in host memory: no step after the next durable one reads it.
        drops: What no later step reads, nor a resumed run: removed when the step is done.
        loads: How many blocks are read from the checkpoint.
        forwards, backwards: How often every sample runs through the block, in either direction.
        weight_gradients: Whether gradients of the weights are computed.
        tries: Whether every candidate prunes the block, and held-out windows run through it.
        prunes: Whether the pruned tensors are written when the step is done.
        saves, takes: Whether statistics of the block are saved for later runs, or are those that an
            earlier run has saved.
        sums: Whether ranks add up what they have measured in the step.
    """

    stage: Stage
    block: int | None = None
    part: str = ""
    reads: tuple[Key, ...] = ()
    writes: tuple[Key, ...] = ()
    drops: tuple[Key, ...] = ()
    durable: bool = True
    held: tuple[Key, ...] = ()
    loads: int = 0
    forwards: int = 0
    backwards: int = 0
    weight_gradients: bool = False
    tries: bool = False
    prunes: bool = False
    saves: bool = False
    takes: bool = False
    sums: bool = False

    def ticks(self, depth: int, nsamples: int, held_out: int = 0) -> int:
        """Return how often the step tells progress: once, or per block, sample or window."""
        if self.block is not None:
            return 1
        if self.loads:
            return depth
        return {"embed": nsamples + held_out, "choose": held_out}.get(self.stage, nsamples)

    @property
    def flops_per_weight_and_token(self) -> int:
        """Return the FLOPs of the step for each weight of its block and each token."""
        return 2 * (self.forwards + self.backwards + self.weight_gradients)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The number of blocks, and the other facts that a table of steps follows from.

    Attributes:
        boundary_interval: Boundaries 0, k, 2k, … are kept for the reverse sweep; those between are
            computed again.
        gradient_parts: In how many parts the gradients of a block are accumulated; each takes a
            forward and a backward pass.
        stores_parts: Whether gradient magnitudes go through the work folder even where the same
            step prunes with them.
        unpruned: Blocks of which nothing is pruned.
        streams: Streams of hidden states that the prune sweep carries.
        parts: Parts of a block that are pruned one after the other; each is measured by itself.
        durable_interval: Of the steps of "reverse", "search" and "prune" every such one is durable,
            and of "dense" in an evaluation; in a run that prunes, above 1, those of "dense" which
            write a boundary that is kept.
        saves, takes: Whether statistics are saved for later runs, or taken from an earlier one.
        rank, ranks: This process, and the processes that share the samples and write in turn.
    """

    depth: int
    boundary_interval: int = 1
    gradient_parts: int = 1
    stores_parts: bool = False
    unpruned: frozenset[int] = frozenset()
    streams: tuple[Stream, ...] = ("pruned",)
    parts: tuple[str, ...] = ("",)
    durable_interval: int = 1
    saves: bool = False
    takes: bool = False
    rank: int = 0
    ranks: int = 1

    def writes_block(self, block: int) -> bool:
        """Return whether this rank writes a block to the output."""
        return block % self.ranks == self.rank


def step_table(work: Workload, choices: Choices) -> tuple[Step, ...]:
    """Return the table of the run that does this work, as was chosen."""
    sizes, limit = work.sizes, choices.accumulator_bytes
    layout = Layout(
        depth=sizes.depth,
        boundary_interval=choices.boundary_interval,
        gradient_parts=len(slices_within(sizes.accumulators, limit)),
        stores_parts=limit is not None or choices.gradient_precision != "float32",
        unpruned=frozenset(block for block, weights in enumerate(sizes.prunable) if not weights),
        durable_interval=choices.durable_interval,
        saves=bool(work.saves),
        takes=bool(work.takes),
    )
    return steps(work.schedule, layout)


@lru_cache(maxsize=256)
def steps(schedule: Schedule, layout: Layout) -> tuple[Step, ...]:
    """Return the table of a run, in order; a planner asks for the same one many times."""
    found: list[Step] = []
    for stage in schedule.stages:
        rows = list(_rows(stage, schedule, layout))
        every = _durable_every(stage, schedule, layout)
        # And the last two: what the first drops is gone when the next stage begins to write.
        ends = [at % every == 0 or at > len(rows) - 2 for at in range(1, len(rows) + 1)]
        if stage == "head" and schedule.evaluates:
            # The losses of an evaluation are its result, which is nowhere before it ends.
            ends = [False]
        found += [replace(row, durable=end) for row, end in zip(rows, ends, strict=True)]
    return _between_durable_steps(_with_drops(found))


def _durable_every(stage: Stage, schedule: Schedule, layout: Layout) -> int:
    """Return the interval at which the steps of a stage are durable.

    In the dense sweep before a reverse sweep it is that of the boundaries which are kept, and thus
    on the disk anyway.
    """
    if schedule.evaluates or stage in ("reverse", "search", "prune"):
        return layout.durable_interval
    return layout.boundary_interval if stage == "dense" and layout.durable_interval > 1 else 1


def steps_done(table: Sequence[Step], entries: int) -> int:
    """Return how many steps are done: those up to the last one of which the journal has an entry.

    `entries` is the number of entries: the journal has one for every durable step.
    """
    durable = [number for number, step in enumerate(table, start=1) if step.durable]
    return [0, *durable][entries]


def reverse_order(depth: int, interval: int) -> list[tuple[int, bool]]:
    """Return the blocks of the reverse sweep, each with whether it runs backward.

    Segment by segment from the last one: forward through all blocks of the segment but the last,
    for the boundaries in between, then backward through all of them (checkpointing, Griewank and
    Walther 2000). At an interval of 1 nothing is computed again.
    """
    order: list[tuple[int, bool]] = []
    for start in range((depth - 1) // interval * interval, -1, -interval):
        stop = min(start + interval, depth)
        order += [(block, False) for block in range(start, stop - 1)]
        order += [(block, True) for block in range(stop - 1, start - 1, -1)]
    return order


def _rows(stage: Stage, schedule: Schedule, layout: Layout) -> Iterator[Step]:
    first, last = boundary("dense", 0), boundary("dense", layout.depth)
    if stage == "embed":
        yield Step(stage="embed", writes=(first,))
    elif stage == "dry_run":
        reads = (first,) if schedule.needs_samples else ()
        yield Step(stage="dry_run", reads=reads, loads=layout.depth)
    elif stage == "dense":
        yield from (_forward("dense", block) for block in range(layout.depth))
    elif stage == "head":
        writes = (loss_gradient(layout.depth),) if "reverse" in schedule.stages else ()
        yield Step(stage="head", reads=(last,), writes=writes)
    elif stage == "reverse":
        yield from _reverse(schedule, layout)
    elif stage == "search":
        yield from _search(schedule, layout)
    elif stage == "choose":
        yield Step(stage="choose", reads=(trial(layout.depth),))
    else:
        yield from _prune(schedule, layout)


def _forward(stage: Stage, block: int) -> Step:
    """Return the step that runs the dense stream through a block."""
    return Step(
        stage=stage,
        block=block,
        reads=(boundary("dense", block),),
        writes=(boundary("dense", block + 1),),
        loads=1,
        forwards=1,
    )


def _reverse(schedule: Schedule, layout: Layout) -> Iterator[Step]:
    prunes = schedule.prune_in == "reverse"
    stores = not prunes or layout.stores_parts
    for block, backward in reverse_order(layout.depth, layout.boundary_interval):
        if not backward:
            yield _forward("reverse", block)
            continue
        pruned = block not in layout.unpruned
        yield Step(
            stage="reverse",
            block=block,
            reads=(boundary("dense", block), loss_gradient(block + 1)),
            writes=(
                *((loss_gradient(block),) if block else ()),
                *((magnitudes(block),) if stores and pruned else ()),
            ),
            loads=1,
            forwards=layout.gradient_parts,
            backwards=layout.gradient_parts,
            weight_gradients=True,
            prunes=prunes and layout.writes_block(block),
            saves=layout.saves and prunes and pruned and layout.writes_block(block),
            sums=pruned,
        )


def _search(schedule: Schedule, layout: Layout) -> Iterator[Step]:
    measures = bool(schedule.prune_forwards)
    for block in range(layout.depth):
        pruned = block not in layout.unpruned
        dense, after = boundary("dense", block), boundary("dense", block + 1)
        yield Step(
            stage="search",
            block=block,
            reads=(
                *((dense,) if measures else ()),
                trial(block),
                *((magnitudes(block),) if schedule.stores_gradients and pruned else ()),
            ),
            writes=(
                *((after,) if measures and block + 1 < layout.depth else ()),
                trial(block + 1),
            ),
            loads=1,
            forwards=int(measures),
            tries=True,
            takes=layout.takes and pruned,
            sums=measures and pruned,
        )


def _prune(schedule: Schedule, layout: Layout) -> Iterator[Step]:
    streams = layout.streams if schedule.prune_forwards else ()
    for block in range(layout.depth):
        pruned = block not in layout.unpruned
        for number, part in enumerate(layout.parts):
            last = number == len(layout.parts) - 1
            leaves = last and block + 1 < layout.depth
            # Samples run once to measure, and once more for the outputs of the pruned block.
            passes = 2 if leaves and schedule.prune_forwards == 2 else 1
            yield Step(
                stage="prune",
                block=block,
                part=part,
                reads=(
                    *(boundary(stream, block) for stream in streams),
                    *((magnitudes(block),) if schedule.stores_gradients and pruned else ()),
                ),
                writes=tuple(boundary(one, block + 1) for one in streams if leaves),
                loads=1,
                forwards=len(streams) * passes,
                prunes=layout.writes_block(block),
                saves=layout.saves and pruned and layout.writes_block(block),
                takes=layout.takes and pruned,
                sums=bool(streams) and pruned,
            )


def _with_drops(rows: Sequence[Step]) -> tuple[Step, ...]:
    """Return the rows, each with the keys that no later row reads before they are written again."""
    read_later: set[Key] = set()
    found: list[Step] = []
    for row in reversed(rows):
        touched = dict.fromkeys((*row.reads, *row.writes))
        dropped = tuple(key for key in touched if key not in read_later)
        found.append(replace(row, drops=dropped))
        read_later.difference_update(row.writes)
        read_later.update(row.reads)
    return tuple(reversed(found))


def _between_durable_steps(rows: Sequence[Step]) -> tuple[Step, ...]:
    """Return the rows, each with what it holds in memory; what a resumed run reads is dropped late.

    A resumed run begins after the last durable step. A key that a step between two durable ones
    writes is held if it is dropped before the second one ends; any other key is on the disk, and
    stays there until a durable step no longer needs it, or until the run is over.
    """
    found: list[Step] = []
    held: set[Key] = set()
    put_off: list[Key] = []
    for at, row in enumerate(rows):
        left = range(at, len(rows))
        end = next((later for later in left if rows[later].durable), len(rows))
        dropped = {key for step in rows[at + 1 : end + 1] for key in step.drops}
        own = () if row.durable else tuple(key for key in row.writes if key in dropped)
        drops = [key for key in row.drops if row.durable or key in {*held, *row.writes}]
        put_off += [key for key in row.drops if key not in drops]
        if row.durable:
            drops, put_off = [*put_off, *drops], []
        held = held.union(own).difference(drops)
        found.append(replace(row, held=own, drops=tuple(drops)))
    return tuple(found)
