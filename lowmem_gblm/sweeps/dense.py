"""Pass 1 and 2: the dense model forward, keeping boundaries; then the loss and its gradient.

*Boundary* i is the hidden states that enter block i; the last one leaves the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.stream import Block, BlockStream
from lowmem_gblm.progress import Progress
from lowmem_gblm.sweeps.conveyor import Conveyor


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
    nsamples: int,
    progress: Progress,
    *,
    keep_every: int | None,
    commit: Commit,
    first: int = 0,
) -> None:
    """Run every sample through every block, first to last, from boundary 0.

    Args:
        keep_every: Which boundaries stay in the spill: 0, k, 2k, … for k, and the last one; only
            the last one for None.
        commit: Called after every block.
        first: Blocks that are done already.
    """
    for block in blocks.stream(range(first, blocks.depth)):
        forward(block, skeleton, conveyor, nsamples, "dense")
        past = keep_every is None or block.index % keep_every
        commit([boundary("dense", block.index)] if past else [])
        progress.step()


@torch.no_grad()
def forward(
    block: Block, skeleton: Skeleton, conveyor: Conveyor, nsamples: int, sweep: str
) -> None:
    """Run every sample through one resident block, from its boundary to the next one."""
    arriving = conveyor.arriving([boundary(sweep, block.index)], nsamples)
    for n, (hidden,) in enumerate(arriving):
        out = skeleton.forward_block(block.index, hidden)
        conveyor.leaving(boundary(sweep, block.index + 1), n, out)


def head_pass(
    skeleton: Skeleton,
    samples_NT: Tensor,
    conveyor: Conveyor,
    scale: float,
    progress: Progress,
) -> list[float]:
    """The loss of every sample; and `scale` times its gradient at the last boundary, spilled.

    Returns:
        The losses, in nats per token.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
    """
    losses = []
    last = boundary("dense", skeleton.depth)
    for n, (hidden,) in enumerate(conveyor.arriving([last], len(samples_NT))):
        loss, gradient = skeleton.loss_and_gradient(hidden, samples_NT[n], scale)
        losses.append(float(loss))
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise NonFiniteError(f"calibration sample {n} has the loss {losses[-1]}")
        conveyor.leaving(boundary("gradient", skeleton.depth), n, gradient)
        progress.step()
    return losses


def losses_of(
    skeleton: Skeleton, samples_NT: Tensor, conveyor: Conveyor, progress: Progress
) -> list[float]:
    """The loss of every sample from the last boundary, in nats per token."""
    losses = []
    last = boundary("dense", skeleton.depth)
    for n, (hidden,) in enumerate(conveyor.arriving([last], len(samples_NT))):
        losses.append(float(skeleton.loss(hidden, samples_NT[n])))
        progress.step()
    return losses
