"""Pass 1 and 2: the dense model forward, keeping boundaries; then the loss and its gradient.

*Boundary* i is the hidden states that enter block i; the last one leaves the last block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.blocks import BlockStream
from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.progress import Progress


def boundary(sweep: str, index: int) -> str:
    """The name under which a sweep spills the boundary before block `index`.

    Boundary 0 is the embedded samples: one and the same for every sweep.
    """
    return f"{sweep}-{index}" if index else "embedded"


def embed(skeleton: Skeleton, samples_NT: Tensor, spill: Spill, progress: Progress) -> None:
    """Spill boundary 0 of every sample, and record how the blocks are called."""
    for n, tokens_T in enumerate(samples_NT):
        spill.write(boundary("dense", 0), n, skeleton.embed(tokens_T))
        progress.step()


def dense_sweep(
    blocks: BlockStream,
    skeleton: Skeleton,
    spill: Spill,
    nsamples: int,
    progress: Progress,
    *,
    keep: bool,
) -> None:
    """Run every sample through every block, first to last, from boundary 0.

    Args:
        keep: Whether all boundaries stay in the spill, or only the last one.
    """
    for block in blocks.stream(range(blocks.depth), keep_raw=False):
        with torch.no_grad():
            for n in range(nsamples):
                hidden = spill.read(boundary("dense", block.index), n).to(skeleton.device)
                out = skeleton.forward_block(block.index, hidden)
                spill.write(boundary("dense", block.index + 1), n, out)
        if not keep:
            spill.drop(boundary("dense", block.index))
        progress.step()


def head_pass(
    skeleton: Skeleton,
    samples_NT: Tensor,
    spill: Spill,
    depth: int,
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
    for n, tokens_T in enumerate(samples_NT):
        hidden = spill.read(boundary("dense", depth), n).to(skeleton.device)
        loss, gradient = skeleton.loss_and_gradient(hidden, tokens_T, scale)
        losses.append(float(loss))
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise NonFiniteError(f"calibration sample {n} has the loss {losses[-1]}")
        spill.write(boundary("gradient", depth), n, gradient)
        progress.step()
    spill.drop(boundary("dense", depth))
    return losses


def losses_of(
    skeleton: Skeleton, samples_NT: Tensor, spill: Spill, depth: int, progress: Progress
) -> list[float]:
    """The loss of every sample from the last boundary, in nats per token."""
    losses = []
    for n, tokens_T in enumerate(samples_NT):
        hidden = spill.read(boundary("dense", depth), n).to(skeleton.device)
        losses.append(float(skeleton.loss(hidden, tokens_T)))
        progress.step()
    return losses
