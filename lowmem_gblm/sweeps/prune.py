"""The prune sweep: first block to last, measure activations, decide, write, advance.

Block i sees the outputs of the pruned blocks before it (`--activations pruned`, as in the code of
Wanda, SparseGPT and GBLM-Pruner), or those of the dense blocks.
"""

from collections.abc import Sequence

import torch

from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.planning.keys import Stream, boundary
from lowmem_gblm.planning.steps import Step
from lowmem_gblm.sweeps.boundaries import advance
from lowmem_gblm.sweeps.context import PruneContext
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from lowmem_gblm.sweeps.statistics.finite import FiniteSamples


def prune_sweep(run: PruneContext) -> None:
    """Prune every block, first block first, and write it."""
    for step, block in run.blocks("prune"):
        measured = measure(run, step, block, "pruned") if step.forwards else []
        run.prune(step, block, measured)
        if step.forwards > 1:
            advance(run, step, block, "pruned")


def measure(
    run: PruneContext, step: Step, block: Block, stream: Stream
) -> list[ActivationStatistic]:
    """Return the statistics of the dense block, by the samples of a stream that stay finite in it.

    A sample that turns non-finite is dropped, and the block is measured again without it.
    """
    advances = step.forwards == 1 and boundary(stream, block.index + 1) in step.writes
    while True:
        order = run.samples.active
        measured = run.activations(len(order))
        found = _run(run, block, stream, order, measured, advances=advances)
        if not found and not all(statistic.is_finite() for statistic in measured):
            found = [n for n in order if not _is_finite_alone(run, block, stream, n)]
        if not found:
            return measured
        run.samples.drop(found, step.stage, block.index)
        # What the others leave is stored already.
        advances = False


def _is_finite_alone(run: PruneContext, block: Block, stream: Stream, n: int) -> bool:
    alone = run.activations(1)
    _run(run, block, stream, [n], alone, advances=False)
    return all(statistic.is_finite() for statistic in alone)


@torch.no_grad()
def _run(
    run: PruneContext,
    block: Block,
    stream: Stream,
    order: Sequence[int],
    measured: Sequence[ActivationStatistic],
    *,
    advances: bool,
) -> list[int]:
    """Run samples through a block; return those that leave it non-finite, where it `advances`."""
    tap = Tap(block.module, block.slots, measured)
    finite = FiniteSamples(order, run.model.device)
    arriving = run.offload.prefetch([boundary(stream, block.index)], order)
    for at, (n, (hidden,)) in enumerate(arriving):
        out = run.model.forward_block(block.index, hidden, tap)
        for statistic in measured:
            statistic.finish_sample()
        if advances:
            finite.look_at(at, out)
            run.offload.write_behind(boundary(stream, block.index + 1), n, out)
        else:
            tap.skip(tap.last)
    tap.check_all_seen()
    return finite.others()
