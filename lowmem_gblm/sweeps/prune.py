"""Pass 4: first block to last, measure activations, decide, write, and go on.

Block i sees the outputs of the pruned blocks before it (`--activations pruned`, as in the code of
Wanda, SparseGPT and GBLM-Pruner), or those of the dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.stream import Block, BlockStream
from lowmem_gblm.model.tap import Tap
from lowmem_gblm.progress import Progress
from lowmem_gblm.stats.activation import ActivationStatistic
from lowmem_gblm.sweeps.conveyor import Conveyor
from lowmem_gblm.sweeps.dense import Commit, boundary, forward

Finish = Callable[[Block, Sequence[ActivationStatistic]], list[str]]


def prune_sweep(
    blocks: BlockStream,
    skeleton: Skeleton,
    conveyor: Conveyor,
    nsamples: int,
    forwards: int,
    progress: Progress,
    *,
    activations: Callable[[], list[ActivationStatistic]],
    finish: Finish,
    commit: Commit,
    first: int = 0,
) -> None:
    """Prune every block, first block first.

    Args:
        nsamples: Samples whose boundary 0 is in the spill.
        forwards: As in `Schedule.prune_forwards`: 0 runs no sample, 1 takes the next boundary
            from the dense block, 2 from the pruned one.
        activations: Makes the statistics to measure, per block.
        finish: Called with each resident block and what was measured; prunes it and writes it.
            Returns what in the spill it will not read again.
        commit: Called after every block.
        first: Blocks that are done already.
    """
    for block in blocks.stream(range(first, blocks.depth)):
        measured = activations()
        last = block.index == blocks.depth - 1
        if forwards:
            _measure(
                block, skeleton, conveyor, nsamples, measured, go_on=forwards == 1 and not last
            )
        past = finish(block, measured)
        if forwards == 2 and not last:
            forward(block, skeleton, conveyor, nsamples, "pruned")
        commit([*past, boundary("pruned", block.index)] if forwards else past)
        progress.step()


@torch.no_grad()
def _measure(
    block: Block,
    skeleton: Skeleton,
    conveyor: Conveyor,
    nsamples: int,
    measured: Sequence[ActivationStatistic],
    *,
    go_on: bool,
) -> None:
    """Run the dense block; with `go_on`, what leaves it is the next boundary."""
    tap = Tap(block.module, block.slots, measured)
    for n, (hidden,) in enumerate(conveyor.arriving([boundary("pruned", block.index)], nsamples)):
        out = skeleton.forward_block(block.index, hidden, tap)
        for statistic in measured:
            statistic.finish_sample()
        if go_on:
            conveyor.leaving(boundary("pruned", block.index + 1), n, out)
        else:
            tap.leave_out(tap.last)
    tap.check_all_seen()
