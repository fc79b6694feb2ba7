"""Pass 4: first block to last, measure activations, decide, write, and go on.

Block i sees the outputs of the pruned blocks before it (`--activations pruned`, as in the code of
Wanda, SparseGPT and GBLM-Pruner), or those of the dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.model.blocks import Block, BlockStream
from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.tap import Tap
from lowmem_gblm.progress import Progress
from lowmem_gblm.stats.activation import ActivationStatistic
from lowmem_gblm.sweeps.dense import boundary

Finish = Callable[[Block, Sequence[ActivationStatistic]], None]


def prune_sweep(
    blocks: BlockStream,
    skeleton: Skeleton,
    spill: Spill,
    nsamples: int,
    forwards: int,
    progress: Progress,
    *,
    activations: Callable[[], list[ActivationStatistic]],
    finish: Finish,
) -> None:
    """Prune every block, first block first.

    Args:
        nsamples: Samples whose boundary 0 is in the spill.
        forwards: As in `Schedule.prune_forwards`: 0 runs no sample, 1 takes the next boundary
            from the dense block, 2 from the pruned one.
        activations: Makes the statistics to measure, per block.
        finish: Called with each resident block and what was measured; prunes it and writes it.
    """
    for block in blocks.stream(range(blocks.depth), keep_raw=True):
        measured = activations()
        last = block.index == blocks.depth - 1
        if forwards:
            _measure(block, skeleton, spill, nsamples, measured, go_on=forwards == 1 and not last)
        finish(block, measured)
        if forwards == 2 and not last:
            _advance(block, skeleton, spill, nsamples)
        if forwards:
            spill.drop(boundary("pruned", block.index))
        progress.step()


@torch.no_grad()
def _measure(
    block: Block,
    skeleton: Skeleton,
    spill: Spill,
    nsamples: int,
    measured: Sequence[ActivationStatistic],
    *,
    go_on: bool,
) -> None:
    """Run the dense block; with `go_on`, what leaves it is the next boundary."""
    tap = Tap(block.module, block.slots, measured)
    for n in range(nsamples):
        hidden = spill.read(boundary("pruned", block.index), n).to(skeleton.device)
        with tap:
            out = skeleton.forward_block(block.index, hidden)
        for statistic in measured:
            statistic.finish_sample()
        if go_on:
            spill.write(boundary("pruned", block.index + 1), n, out)
    tap.check_all_seen()


@torch.no_grad()
def _advance(block: Block, skeleton: Skeleton, spill: Spill, nsamples: int) -> None:
    """Run the pruned block for the next boundary."""
    for n in range(nsamples):
        hidden = spill.read(boundary("pruned", block.index), n).to(skeleton.device)
        out = skeleton.forward_block(block.index, hidden)
        spill.write(boundary("pruned", block.index + 1), n, out)
