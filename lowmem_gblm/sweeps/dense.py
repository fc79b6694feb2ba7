"""Pass 1 and 2: the dense model forward, keeping boundaries; then the loss and its gradient.

*Boundary* i is the hidden states that enter block i; the last one leaves the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_gblm.model.block_loader import Block, BlockLoader
from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.sample_set import SampleSet, non_finite
from lowmem_gblm.sweeps.statistics.finite import all_finite


def boundary(sweep: str, index: int) -> str:
    """The name under which a sweep spills the boundary before block `index`.

    Boundary 0 is the embedded samples: one and the same for every sweep.
    """
    return f"{sweep}-{index}" if index else "embedded"


Commit = Callable[[Sequence[str]], None]
"""Called when a step is done, with the names in the spill that no later step reads."""


def embed(
    streamed: StreamedModel, samples_NT: Tensor, offload: Offload, progress: Progress
) -> None:
    """Spill boundary 0 of every sample, and record how the blocks are called."""
    for n, tokens_T in enumerate(samples_NT):
        offload.write_behind(boundary("dense", 0), n, streamed.embed(tokens_T))
        progress.step()
    offload.settle()


def learn_calls(streamed: StreamedModel, samples_NT: Tensor) -> None:
    """Record how the blocks are called, where boundary 0 is in the spill already."""
    for tokens_T in samples_NT[:2]:
        streamed.embed(tokens_T)


def dense_sweep(
    blocks: BlockLoader,
    streamed: StreamedModel,
    offload: Offload,
    samples: SampleSet,
    progress: Progress,
    *,
    boundary_interval: int | None,
    commit: Commit,
    first: int = 0,
    prunes_later: bool = True,
) -> None:
    """Run every sample through every block, first to last, from boundary 0.

    Args:
        samples: Which; those that turn non-finite are dropped.
        boundary_interval: Which boundaries stay in the spill: 0, k, 2k, … for k, and the last one;
            only the last one for None.
        commit: Called after every block.
        first: Blocks that are done already.
        prunes_later: Whether what a later sweep could not follow is to be found here already.

    Raises:
        UnsupportedModel: A block is computed in a way that is not followed.
    """
    for block in blocks.stream(range(first, blocks.depth)):
        tap = Tap(block.module, block.slots if prunes_later else [], [])
        forward(block, streamed, offload, samples, sweep="dense", name="dense", tap=tap)
        tap.check_all_seen()
        past = boundary_interval is None or block.index % boundary_interval
        commit([boundary("dense", block.index)] if past else [])
        progress.step()


@torch.no_grad()
def forward(
    block: Block,
    streamed: StreamedModel,
    offload: Offload,
    samples: SampleSet,
    *,
    sweep: str,
    name: str,
    tap: Tap | None = None,
) -> None:
    """Run every sample through one resident block, from its boundary to the next one.

    Args:
        samples: Which; those that leave the block non-finite are dropped.
        sweep: Whose boundaries.
        name: Of the pass.
        tap: Sees the multiplications until it has met every matrix.

    Raises:
        NonFiniteError: Too many are dropped.
    """
    order, finite = samples.active, []
    for n, (hidden,) in offload.prefetch([boundary(sweep, block.index)], order):
        tap = None if tap is None or tap.has_seen_all else tap
        out = streamed.forward_block(block.index, hidden, tap)
        finite.append(all_finite(out))
        offload.write_behind(boundary(sweep, block.index + 1), n, out)
    samples.drop(non_finite(order, finite), name, block.index)


def head_pass(
    streamed: StreamedModel,
    samples_NT: Tensor,
    samples: SampleSet,
    offload: Offload,
    scale: float,
    progress: Progress,
) -> list[float]:
    """The loss of every sample; and `scale` times its gradient at the last boundary, spilled.

    Args:
        samples: Which; those whose loss is not finite are dropped, those whose gradient overflows
            are scaled with less.

    Returns:
        The losses of those that are left, in nats per token.

    Raises:
        NonFiniteError: Too many are dropped.
    """
    losses = []
    last = boundary("dense", streamed.depth)
    for n, (hidden,) in offload.prefetch([last], samples.active):
        while True:
            factor = scale * 2.0 ** -samples.exponent(n)
            loss, gradient = streamed.loss_and_gradient(hidden, samples_NT[n], factor)
            sound = bool(loss.isfinite() & all_finite(gradient))
            if sound or not bool(loss.isfinite()) or not samples.reduce_scale(n):
                break
        if sound:
            losses.append(float(loss))
            offload.write_behind(boundary("gradient", streamed.depth), n, gradient)
        else:
            samples.drop([n], "head", None)
        progress.step()
    return losses


def losses_of(
    streamed: StreamedModel, samples_NT: Tensor, offload: Offload, progress: Progress
) -> list[float]:
    """The loss of every sample from the last boundary, in nats per token."""
    losses = []
    last = boundary("dense", streamed.depth)
    for n, (hidden,) in offload.prefetch([last], range(len(samples_NT))):
        losses.append(float(streamed.loss(hidden, samples_NT[n])))
        progress.step()
    return losses
