"""Which stages run: they follow from what a method needs."""

from __future__ import annotations

import pytest

from lowmem_gblm.methods import find_method
from lowmem_gblm.planning.schedule import Schedule, schedule
from lowmem_gblm.planning.steps import Layout, reverse_order, steps
from lowmem_gblm.sweeps.statistics import needed_statistics

DEPTH = 4


def totals(made) -> tuple[int, int]:
    """Return how often a block is read, and its FLOPs per weight and token."""
    rows = steps(made, Layout(depth=DEPTH))
    saved = 2 * (made.prune_forwards == 2)
    flops = sum(row.flops_per_weight_and_token for row in rows) + saved
    return sum(row.loads for row in rows) // DEPTH, flops // DEPTH


TABLE = [
    # method, activations, stages, blocks read, FLOPs per parameter and token
    ("magnitude", "pruned", "prune", 1, 0),
    ("magnitude", "dense", "prune", 1, 0),
    ("wanda", "pruned", "embed prune", 1, 4),
    ("wanda", "dense", "embed prune", 1, 2),
    ("sparsegpt", "pruned", "embed prune", 1, 4),
    ("sparsegpt", "dense", "embed prune", 1, 2),
    ("gradient", "pruned", "embed dense head reverse", 2, 8),
    ("gradient", "dense", "embed dense head reverse", 2, 8),
    ("gblm", "pruned", "embed dense head reverse prune", 3, 12),
    ("gblm", "dense", "embed dense head reverse", 2, 8),
]


def needs(method: str) -> tuple[str, ...]:
    found = find_method(method)
    return found.needs_with(found.options())


def schedule_of(needs: tuple[str, ...], activations: str, *, in_place: bool = False) -> Schedule:
    needed = needed_statistics(needs)
    return schedule(
        activations,
        needs_backward=needed.gradient is not None,
        needs_forward=bool(needed.activations),
        in_place=in_place,
    )


@pytest.mark.parametrize(("method", "activations", "stages", "reads", "flops"), TABLE)
def test_a_method_runs_the_stages_that_it_needs(method, activations, stages, reads, flops):
    made = schedule_of(needs(method), activations)
    assert made.stages == tuple(stages.split())
    assert totals(made) == (reads, flops)


@pytest.mark.parametrize(("method", "activations", "stages", "reads", "flops"), TABLE)
def test_blocks_are_pruned_in_the_last_stage(method, activations, stages, reads, flops):
    made = schedule_of(needs(method), activations)
    assert made.prune_in == made.stages[-1]


@pytest.mark.parametrize(("method", "activations", "stages", "reads", "flops"), TABLE)
def test_in_place_all_blocks_are_read_before_one_is_overwritten(
    method, activations, stages, reads, flops
):
    made = schedule_of(needs(method), activations, in_place=True)
    dry_runs = "dense" not in stages
    assert made.stages[:-1] == (*stages.split()[:-1], *(["dry_run"] if dry_runs else []))
    assert made.prune_in == stages.split()[-1]
    assert totals(made) == (reads + dry_runs, flops)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gblm", "gradient", "sparsegpt"])
def test_only_magnitude_needs_no_samples(method):
    needed = schedule_of(needs(method), "pruned").needs_samples
    assert needed == (method != "magnitude")


@pytest.mark.parametrize(
    ("needs", "activations", "forwards"),
    [
        ((), "pruned", 0),
        (("gradient_l1",), "pruned", 0),
        (("input_norm",), "dense", 1),
        (("gram",), "dense", 1),
        (("input_norm",), "pruned", 2),
        (("gram", "gradient_l2"), "pruned", 2),
    ],
)
def test_samples_run_again_where_the_pruned_block_gives_the_next_boundary(
    needs, activations, forwards
):
    assert schedule_of(needs, activations).prune_forwards == forwards


@pytest.mark.parametrize(
    ("depth", "boundary_interval", "order"),
    [
        (4, 1, "<3 <2 <1 <0"),
        (5, 2, "<4 2> <3 <2 0> <1 <0"),
        (7, 3, "<6 3> 4> <5 <4 <3 0> 1> <2 <1 <0"),
        (3, 5, "0> 1> <2 <1 <0"),
        (1, 1, "<0"),
    ],
)
def test_the_order_in_which_boundaries_are_computed_again(depth, boundary_interval, order):
    found = reverse_order(depth, boundary_interval)
    assert " ".join(f"<{block}" if backward else f"{block}>" for block, backward in found) == order
