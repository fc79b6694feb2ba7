"""Boundaries: hidden states between blocks, and the forward pass from one to the next."""

from contextlib import nullcontext
from itertools import groupby, islice

import torch
from torch import Tensor

from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.planning.keys import Stream, boundary
from lowmem_gblm.planning.steps import Step
from lowmem_gblm.sweeps.context import SweepContext
from lowmem_gblm.sweeps.prefix_check import check_embeddings, foreign_errors_mean_no
from lowmem_gblm.sweeps.statistics.finite import FiniteSamples


def embed(run: SweepContext) -> None:
    """Write boundary 0 of every sample and held-out window; record how the blocks are called."""
    if run.is_done("embed"):
        # The first two samples of a shape tell how the blocks are called, and whether always alike.
        with run.model.filled(run.checkpoint):
            check_embeddings(run)
            for _, alike in groupby(range(len(run.tokens)), key=run.shape):
                for n in islice(alike, 2):
                    _embedded(run, n, run.tokens[n])
    for step in run.steps("embed"):
        with run.model.filled(run.checkpoint):
            check_embeddings(run)
            for n, tokens_BT in enumerate((*run.tokens, *run.held_out)):
                run.progress.check()
                run.offload.write_behind(step.writes[0], n, _embedded(run, n, tokens_BT))
                run.progress.step()
        run.offload.settle()


def _embedded(run: SweepContext, n: int, tokens_BT: Tensor) -> Tensor:
    """Return boundary 0 of a sample; raise `PrefixNotShared` if only its layout makes it fail."""
    layout = run.layouts.get(n)
    with nullcontext() if layout is None else foreign_errors_mean_no():
        return run.model.embed(tokens_BT, layout)


@torch.no_grad()
def advance(
    run: SweepContext, step: Step, block: Block, stream: Stream, tap: Tap | None = None
) -> None:
    """Run every sample of a stream through a resident block, from its boundary to the next one.

    Samples that leave it non-finite are dropped. `tap` is used until it has seen every matrix.
    """
    order = run.samples.active
    finite = FiniteSamples(order, run.model.device)
    after = boundary(stream, block.index + 1)
    arriving = run.offload.prefetch([boundary(stream, block.index)], order)
    for at, (n, (hidden,)) in enumerate(arriving):
        if tap is not None and not tap.never_seen:
            tap = None
        out = run.model.forward_block(block.index, hidden, tap, run.layouts.get(n))
        finite.look_at(at, out)
        run.offload.write_behind(after, n, out)
    run.samples.drop(finite.others(), step.stage, block.index)
