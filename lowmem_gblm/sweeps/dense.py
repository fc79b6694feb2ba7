"""Pass 1 and 2: the dense model forward, keeping boundaries; then the loss and its gradient.

*Boundary* i is the hidden states that enter block i; the last one leaves the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.stream import Block, BlockStream
from lowmem_gblm.model.tap import Tap
from lowmem_gblm.progress import Progress
from lowmem_gblm.stats.finite import all_finite
from lowmem_gblm.sweeps.conveyor import Conveyor
from lowmem_gblm.sweeps.samples import Samples, sick


def boundary(sweep: str, index: int) -> str:
    """The name under which a sweep spills the boundary before block `index`.

    Boundary 0 is the embedded samples: one and the same for every sweep.
    """
    return f"{sweep}-{index}" if index else "embedded"


Commit = Callable[[Sequence[str]], None]
"""Called when a step is done, with the names in the spill that no later step reads."""


def embed(skeleton: Skeleton, samples_NT: Tensor, conveyor: Conveyor, progress: Progress) -> None:
    """Spill boundary 0 of every sample, and record how the blocks are called."""
    for n, tokens_T in enumerate(samples_NT):
        conveyor.leaving(boundary("dense", 0), n, skeleton.embed(tokens_T))
        progress.step()
    conveyor.settle()


def learn_calls(skeleton: Skeleton, samples_NT: Tensor) -> None:
    """Record how the blocks are called, where boundary 0 is in the spill already."""
    for tokens_T in samples_NT[:2]:
        skeleton.embed(tokens_T)


def dense_sweep(
    blocks: BlockStream,
    skeleton: Skeleton,
    conveyor: Conveyor,
    samples: Samples,
    progress: Progress,
    *,
    keep_every: int | None,
    commit: Commit,
    first: int = 0,
    prunes_later: bool = True,
) -> None:
    """Run every sample through every block, first to last, from boundary 0.

    Args:
        samples: Which; those that turn non-finite are dropped.
        keep_every: Which boundaries stay in the spill: 0, k, 2k, … for k, and the last one; only
            the last one for None.
        commit: Called after every block.
        first: Blocks that are done already.
        prunes_later: Whether what a later sweep could not follow is to be found here already.

    Raises:
        UnsupportedModel: A block is computed in a way that is not followed.
    """
    for block in blocks.stream(range(first, blocks.depth)):
        tap = Tap(block.module, block.slots if prunes_later else [], [])
        forward(block, skeleton, conveyor, samples, sweep="dense", name="dense", tap=tap)
        tap.check_all_seen()
        past = keep_every is None or block.index % keep_every
        commit([boundary("dense", block.index)] if past else [])
        progress.step()


@torch.no_grad()
def forward(
    block: Block,
    skeleton: Skeleton,
    conveyor: Conveyor,
    samples: Samples,
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
    order, finite = samples.left, []
    for n, (hidden,) in conveyor.arriving([boundary(sweep, block.index)], order):
        tap = None if tap is None or tap.has_seen_all else tap
        out = skeleton.forward_block(block.index, hidden, tap)
        finite.append(all_finite(out))
        conveyor.leaving(boundary(sweep, block.index + 1), n, out)
    samples.drop(sick(order, finite), name, block.index)


def head_pass(
    skeleton: Skeleton,
    samples_NT: Tensor,
    samples: Samples,
    conveyor: Conveyor,
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
    last = boundary("dense", skeleton.depth)
    for n, (hidden,) in conveyor.arriving([last], samples.left):
        while True:
            factor = scale * 2.0 ** -samples.exponent(n)
            loss, gradient = skeleton.loss_and_gradient(hidden, samples_NT[n], factor)
            sound = bool(loss.isfinite() & all_finite(gradient))
            if sound or not bool(loss.isfinite()) or not samples.weaken(n):
                break
        if sound:
            losses.append(float(loss))
            conveyor.leaving(boundary("gradient", skeleton.depth), n, gradient)
        else:
            samples.drop([n], "head", None)
        progress.step()
    return losses


def losses_of(
    skeleton: Skeleton, samples_NT: Tensor, conveyor: Conveyor, progress: Progress
) -> list[float]:
    """The loss of every sample from the last boundary, in nats per token."""
    losses = []
    last = boundary("dense", skeleton.depth)
    for n, (hidden,) in conveyor.arriving([last], range(len(samples_NT))):
        losses.append(float(skeleton.loss(hidden, samples_NT[n])))
        progress.step()
    return losses
