"""The table of steps: what is read was written and not yet dropped, and nothing stays behind.

A small simulation of the work folder runs every table; the table itself knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_gblm.planning.keys import Key, boundary, magnitudes
from lowmem_gblm.planning.schedule import EVALUATION, Schedule, schedule
from lowmem_gblm.planning.steps import Layout, Step, steps

# Whether statistics of gradients are needed, and of activations.
NEEDS = [(False, False), (False, True), (True, False), (True, True)]
SCHEDULES = [
    EVALUATION,
    *(
        schedule(
            activations,
            needs_backward=backward,
            needs_forward=forward,
            in_place=in_place,
            searches=searches,
        )
        for (backward, forward), activations, in_place, searches in product(
            NEEDS, ("pruned", "dense"), (False, True), (False, True)
        )
    ),
]
# Matrices of a block that share an input are pruned together.
SUB_STEPS = ("q k v", "o", "gate up", "down")

schedules = st.sampled_from(SCHEDULES)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw any layout that a run may have, or will."""
    depth = draw(st.integers(1, 9))
    ranks = draw(st.integers(1, 4))
    return Layout(
        depth=depth,
        boundary_interval=draw(st.integers(1, depth)),
        gradient_parts=draw(st.integers(1, 3)),
        stores_parts=draw(st.booleans()),
        unpruned=frozenset(draw(st.sets(st.integers(0, depth - 1), max_size=2))),
        streams=draw(st.sampled_from([("pruned",), ("dense", "pruned")])),
        parts=draw(st.sampled_from([("",), SUB_STEPS])),
        saves=draw(st.booleans()),
        takes=draw(st.booleans()),
        rank=draw(st.integers(0, ranks - 1)),
        ranks=ranks,
        durable_interval=draw(st.integers(1, 4)),
    )


def simulate(rows: tuple[Step, ...]) -> Iterator[set[Key]]:
    """Yield what is stored after every step; what it drops goes beside the next step."""
    stored: set[Key] = set()
    leaving: tuple[Key, ...] = ()
    for row in rows:
        assert not set(row.reads) - stored, f"{row} reads what is not stored"
        assert not set(row.writes) & set(leaving), f"{row} writes what is being dropped"
        stored |= set(row.writes)
        assert set(row.drops) <= stored, f"{row} drops what is not stored"
        stored -= set(leaving)
        leaving = row.drops
        yield stored - set(leaving)


def staying(made: Schedule, rows: tuple[Step, ...]) -> set[Key]:
    """What is stored to the end: of an evaluation, what its result comes from."""
    return set(rows[-1].reads) if made == EVALUATION else set()


@given(schedules, layouts())
def test_what_is_read_is_stored_and_nothing_else_stays(made: Schedule, layout: Layout) -> None:
    rows = steps(made, layout)
    *_, left = simulate(rows)
    assert left == staying(made, rows)


@given(schedules, layouts())
def test_nothing_is_dropped_that_is_read_later_and_nothing_kept_that_is_not(
    made: Schedule, layout: Layout
) -> None:
    rows = steps(made, layout)
    for number, stored in enumerate(simulate(rows)):
        later = [(row.reads, row.writes) for row in rows[number + 1 :]]
        for key in stored - staying(made, rows) if layout.durable_interval == 1 else ():
            first = next(reads for reads, writes in later if key in (*reads, *writes))
            assert key in first, f"{key} is kept after step {number} and written again"


@given(schedules, layouts())
def test_a_run_can_be_resumed_from_its_last_durable_step(made: Schedule, layout: Layout) -> None:
    """Wherever it is killed: what it reads then is on the disk, though later steps have dropped."""
    rows = steps(made, layout)
    assert rows[-1].durable == (made != EVALUATION)
    journal: set[Key] = set()
    written: set[Key] = set()
    resumes_at = 0
    for number, row in enumerate(rows):
        written |= set(row.writes) - set(row.held)
        assert not set(row.held) - set(row.writes)
        if row.durable:
            assert not row.held
            journal |= written
            journal -= set(row.drops)
            written, resumes_at = set(), number + 1
        else:
            assert not set(row.drops) & journal, f"{row} drops what a resumed run reads"
            written -= set(row.drops)
        *_, left = simulate_from(rows[resumes_at:], journal)
        assert left == staying(made, rows)


def simulate_from(rows: tuple[Step, ...], stored: set[Key]) -> Iterator[set[Key]]:
    """Yield what is stored where a resumed run begins, and after each of its steps."""
    stored = set(stored)
    yield stored
    for row in rows:
        assert not set(row.reads) - stored, f"{row} reads what is not stored"
        stored |= set(row.writes)
        stored -= set(row.drops)
        yield stored


def test_between_durable_steps_hidden_states_are_held_in_memory() -> None:
    made = schedule("pruned", needs_backward=True, needs_forward=True)
    rows = steps(made, Layout(depth=5, durable_interval=2))
    swept = [row for row in rows if row.stage in ("reverse", "prune")]
    assert [row.durable for row in swept] == [False, True, False, True, True] * 2
    assert [" ".join(map(str, row.held)) for row in swept if row.held] == [
        "loss-gradient-4", "loss-gradient-2", "pruned-1", "pruned-3",
    ]  # fmt: skip
    first, second = swept[5:7]
    assert set(map(str, first.drops)) == set()
    assert set(map(str, second.drops)) == {
        "embedded-0", "magnitudes-0", "pruned-1", "magnitudes-1",
    }  # fmt: skip


@given(schedules, layouts())
def test_every_block_is_pruned_once_and_after_its_last_other_use(
    made: Schedule, layout: Layout
) -> None:
    rows = steps(made, layout)
    pruned = [row.block for row in rows if row.prunes]
    mine = [block for block in range(layout.depth) if block % layout.ranks == layout.rank]
    times = len(layout.parts) if made.prune_in == "prune" else 1
    assert sorted(pruned) == sorted(mine * times * (made.prune_in is not None))
    if made.prune_in is None:
        return
    for block in mine:
        uses = [number for number, row in enumerate(rows) if row.block == block]
        assert rows[uses[-1]].prunes


@given(schedules, layouts())
def test_statistics_are_saved_where_a_block_is_pruned_and_taken_where_none_are_measured(
    made: Schedule, layout: Layout
) -> None:
    rows = steps(made, layout)
    pruned = [row.block for row in rows if row.prunes and row.block not in layout.unpruned]
    assert [row.block for row in rows if row.saves] == pruned * layout.saves
    taking = [row for row in rows if row.takes]
    assert all(row.stage in ("search", "prune") and layout.takes for row in taking)
    assert {row.block for row in taking}.isdisjoint(layout.unpruned)
    if layout.takes and made.prune_in == "prune":
        assert {*pruned} <= {row.block for row in taking}


@given(layouts())
def test_a_boundary_is_kept_or_computed_again(layout: Layout) -> None:
    """The reverse sweep finds every boundary that it starts from."""
    made = schedule("pruned", needs_backward=True, needs_forward=False)
    rows = steps(made, layout)
    computed = [row for row in rows if row.stage == "reverse" and not row.backwards]
    kept = {block for block in range(0, layout.depth, layout.boundary_interval)}
    again = {row.block + 1 for row in computed}
    assert again == set(range(layout.depth)) - kept
    assert all(row.forwards == 1 and not row.prunes for row in computed)


def test_boundaries_that_are_not_kept_are_held_in_the_dense_sweep() -> None:
    made = schedule("pruned", needs_backward=True, needs_forward=True)
    rows = steps(made, Layout(depth=7, durable_interval=2, boundary_interval=3))
    dense = [row for row in rows if row.stage == "dense"]
    assert [" ".join(map(str, row.held)) for row in dense] == [
        "dense-1", "dense-2", "", "dense-4", "dense-5", "", "",
    ]  # fmt: skip


def test_the_table_of_three_blocks_can_be_read() -> None:
    rows = steps(schedule("pruned", needs_backward=True, needs_forward=True), Layout(depth=2))
    told = [
        f"{row.stage} {'' if row.block is None else row.block}: {' '.join(map(str, row.reads))} -> "
        f"{' '.join(map(str, row.writes))} drops {' '.join(map(str, row.drops))}"
        for row in rows
    ]
    assert told == [
        "embed :  -> embedded-0 drops ",
        "dense 0: embedded-0 -> dense-1 drops ",
        "dense 1: dense-1 -> dense-2 drops ",
        "head : dense-2 -> loss-gradient-2 drops dense-2",
        "reverse 1: dense-1 loss-gradient-2 -> loss-gradient-1 magnitudes-1 drops "
        "dense-1 loss-gradient-2",
        "reverse 0: embedded-0 loss-gradient-1 -> magnitudes-0 drops loss-gradient-1",
        "prune 0: embedded-0 magnitudes-0 -> pruned-1 drops embedded-0 magnitudes-0",
        "prune 1: pruned-1 magnitudes-1 ->  drops pruned-1 magnitudes-1",
    ]


def test_dense_activations_prune_in_the_reverse_sweep_and_store_no_magnitudes() -> None:
    made = schedule("dense", needs_backward=True, needs_forward=True)
    rows = steps(made, Layout(depth=3))
    assert [row.block for row in rows if row.prunes] == [2, 1, 0]
    assert not any(key.kind == "magnitudes" for row in rows for key in row.writes)
    parts = steps(made, Layout(depth=3, gradient_parts=2, stores_parts=True))
    for row in (row for row in parts if row.backwards):
        assert magnitudes(row.block) in row.writes
        assert magnitudes(row.block) in row.drops


def test_two_streams_lie_side_by_side_and_share_their_first_boundary() -> None:
    made = schedule("pruned", needs_backward=False, needs_forward=True)
    one = steps(made, Layout(depth=4))
    two = steps(made, Layout(depth=4, streams=("dense", "pruned")))
    assert [row.block for row in one] == [row.block for row in two]
    assert two[2].reads == (boundary("dense", 1), boundary("pruned", 1))
    assert two[2].writes == (boundary("dense", 2), boundary("pruned", 2))
    assert boundary("dense", 0) == boundary("pruned", 0)
    assert sum(row.forwards for row in two) == 2 * sum(row.forwards for row in one)


def test_the_parts_of_a_block_are_steps_and_only_the_last_one_advances() -> None:
    made = schedule("pruned", needs_backward=False, needs_forward=True)
    rows = steps(made, Layout(depth=3, parts=SUB_STEPS))
    assert [row.part for row in rows[1:]] == [*SUB_STEPS] * 3
    assert all(row.prunes for row in rows[1:])
    for row in rows[1:]:
        assert bool(row.writes) == (row.part == "down" and row.block < 2)
        assert bool(row.drops) == (row.part == "down")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("made", SCHEDULES[1:])
def test_ranks_take_the_same_steps_sum_together_and_write_each_block_once(
    made: Schedule, ranks: int
) -> None:
    tables = [steps(made, Layout(depth=5, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for rows in zip(*tables, strict=True):
        assert len({(row.stage, row.block, row.reads, row.writes, row.sums) for row in rows}) == 1
        pruned = rows[0].stage == made.prune_in and bool(rows[0].loads)
        pruned = pruned and (rows[0].stage == "prune" or rows[0].backwards > 0)
        assert sum(row.prunes for row in rows) == pruned
