"""Pass 4: first block to last, measure activations, decide, write, and go on.

Block i sees the outputs of the pruned blocks before it (`--activations pruned`, as in the code of
Wanda, SparseGPT and GBLM-Pruner), or those of the dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from lowmem_gblm.model.block_loader import Block, BlockLoader
from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.sweeps.dense import Commit, boundary, forward
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.sample_set import SampleSet, non_finite
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from lowmem_gblm.sweeps.statistics.finite import all_finite

Finish = Callable[[Block, Sequence[ActivationStatistic]], list[str]]


def prune_sweep(
    blocks: BlockLoader,
    streamed: StreamedModel,
    offload: Offload,
    samples: SampleSet,
    forwards: int,
    progress: Progress,
    *,
    activations: Callable[[int], list[ActivationStatistic]],
    finish: Finish,
    commit: Commit,
    first: int = 0,
) -> None:
    """Prune every block, first block first.

    Args:
        samples: Those whose boundary 0 is in the spill; the ones that turn non-finite are dropped.
        forwards: As in `Schedule.prune_forwards`: 0 runs no sample, 1 takes the next boundary
            from the dense block, 2 from the pruned one.
        activations: Makes the statistics to measure, per block, for so many samples.
        finish: Called with each resident block and what was measured; prunes it and writes it.
            Returns what in the spill it will not read again.
        commit: Called after every block.
        first: Blocks that are done already.
    """
    for block in blocks.stream(range(first, blocks.depth)):
        measured: Sequence[ActivationStatistic] = []
        last = block.index == blocks.depth - 1
        if forwards:
            go_on = forwards == 1 and not last
            measured = _measured(block, streamed, offload, samples, activations, go_on=go_on)
        past = finish(block, measured)
        if forwards == 2 and not last:
            forward(block, streamed, offload, samples, sweep="pruned", name="prune")
        commit([*past, boundary("pruned", block.index)] if forwards else past)
        progress.step()


def _measured(
    block: Block,
    streamed: StreamedModel,
    offload: Offload,
    samples: SampleSet,
    activations: Callable[[int], list[ActivationStatistic]],
    *,
    go_on: bool,
) -> list[ActivationStatistic]:
    """Statistics of the dense block by the samples that stay finite in it.

    Args:
        go_on: Whether what leaves the block is the next boundary.
    """
    run = partial(_run, block, streamed, offload)

    def sound(n: int) -> bool:
        alone = activations(1)
        run([n], alone, go_on=False)
        return all(statistic.is_finite() for statistic in alone)

    while True:
        order = samples.active
        measured = activations(len(order))
        found = run(order, measured, go_on=go_on)
        if not found and not all(statistic.is_finite() for statistic in measured):
            found = [n for n in order if not sound(n)]
        if not found:
            return measured
        samples.drop(found, "prune", block.index)
        # What the others leave is in the spill already.
        go_on = False


@torch.no_grad()
def _run(
    block: Block,
    streamed: StreamedModel,
    offload: Offload,
    order: Sequence[int],
    measured: Sequence[ActivationStatistic],
    *,
    go_on: bool,
) -> list[int]:
    """Run these samples; returns those that leave the block non-finite, where they go on."""
    tap = Tap(block.module, block.slots, measured)
    finite = []
    for n, (hidden,) in offload.prefetch([boundary("pruned", block.index)], order):
        out = streamed.forward_block(block.index, hidden, tap)
        for statistic in measured:
            statistic.finish_sample()
        if go_on:
            finite.append(all_finite(out))
            offload.write_behind(boundary("pruned", block.index + 1), n, out)
        else:
            tap.skip(tap.last)
    tap.check_all_seen()
    return non_finite(order, finite) if go_on else []
