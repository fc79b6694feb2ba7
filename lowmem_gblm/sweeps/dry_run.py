"""Before a model is overwritten: one sample through all of it, while it is still what it was."""

from __future__ import annotations

import torch

from lowmem_gblm.model.block_loader import BlockLoader
from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.sweeps.dense import boundary
from lowmem_gblm.sweeps.offload import Offload


@torch.no_grad()
def dry_run(
    blocks: BlockLoader,
    streamed: StreamedModel,
    offload: Offload,
    progress: Progress,
    *,
    runs_samples: bool,
) -> None:
    """Read every block, and follow the first sample through it.

    Args:
        runs_samples: Whether boundary 0 is in the spill; without, the blocks are only read.

    Raises:
        NonFiniteError: A NaN or an infinity is in a tensor.
        UnsupportedModel: A block is computed in a way that is not followed.
    """
    names = [boundary("dense", 0)]
    hidden = None
    if runs_samples:
        ((_, (hidden,)),) = offload.prefetch(names, [0])
    for block in blocks.stream(range(blocks.depth)):
        if hidden is not None:
            tap = Tap(block.module, block.slots, [])
            hidden = streamed.forward_block(block.index, hidden, tap)
            tap.check_all_seen()
        progress.step()
