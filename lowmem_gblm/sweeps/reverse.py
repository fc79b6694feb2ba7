"""Pass 3: last block to first, forward again and backward, for the gradient magnitudes.

Checkpointed back-propagation over boundaries that were kept on the way forward (Griewank and
Walther's "checkpointing"; "rematerialization"), with one decoder block as the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.blocks import Block, BlockStream
from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.tap import Slot, Tap
from lowmem_gblm.progress import Progress
from lowmem_gblm.stats.activation import ActivationStatistic
from lowmem_gblm.stats.gradient import Gradient, GradientNorm
from lowmem_gblm.sweeps.dense import boundary

Finish = Callable[[Block, dict[Slot, Tensor], Sequence[ActivationStatistic]], None]


def reverse_sweep(
    blocks: BlockStream,
    skeleton: Skeleton,
    spill: Spill,
    nsamples: int,
    norm: GradientNorm,
    scale: float,
    progress: Progress,
    *,
    keep_raw: bool,
    activations: Callable[[], list[ActivationStatistic]],
    finish: Finish,
) -> None:
    """Measure every block's gradient magnitudes, last block first.

    Args:
        norm: l1 or l2 over samples.
        scale: What the loss was multiplied with.
        keep_raw: Whether `finish` wants the tensors as they lie on disk.
        activations: Makes the activation statistics to measure in the same forward, per block.
        finish: Called with each resident block and what was measured; it may prune and write.
    """
    for block in blocks.stream(range(blocks.depth - 1, -1, -1), keep_raw=keep_raw):
        gradient = Gradient(norm, scale)
        measured = activations()
        tap = Tap(block.module, block.slots, [*measured, gradient])
        for n in range(nsamples):
            _one_sample(skeleton, spill, tap, block.index, n)
            gradient.finish_sample()
            for statistic in measured:
                statistic.finish_sample()
        tap.check_all_seen()
        spill.drop(boundary("gradient", block.index + 1))
        if block.index:
            spill.drop(boundary("dense", block.index))
        finish(block, gradient.results(), measured)
        progress.step()


def _one_sample(skeleton: Skeleton, spill: Spill, tap: Tap, index: int, n: int) -> None:
    hidden = spill.read(boundary("dense", index), n).to(skeleton.device)
    arriving = spill.read(boundary("gradient", index + 1), n).to(skeleton.device)
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad(), tap:
        out = skeleton.forward_block(index, hidden)
    (leaving,) = torch.autograd.grad(out, hidden, arriving)
    if not bool(leaving.isfinite().all()):
        raise NonFiniteError(f"the gradient of calibration sample {n} overflows in block {index}")
    if index:
        spill.write(boundary("gradient", index), n, leaving)
