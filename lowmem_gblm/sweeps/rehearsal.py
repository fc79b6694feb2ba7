"""Before a model is overwritten: one sample through all of it, while it is still what it was."""

from __future__ import annotations

import torch

from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.stream import BlockStream
from lowmem_gblm.model.tap import Tap
from lowmem_gblm.progress import Progress
from lowmem_gblm.sweeps.conveyor import Conveyor
from lowmem_gblm.sweeps.dense import boundary


@torch.no_grad()
def rehearse(
    blocks: BlockStream,
    skeleton: Skeleton,
    conveyor: Conveyor,
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
        ((_, (hidden,)),) = conveyor.arriving(names, [0])
    for block in blocks.stream(range(blocks.depth)):
        if hidden is not None:
            tap = Tap(block.module, block.slots, [])
            hidden = skeleton.forward_block(block.index, hidden, tap)
            tap.check_all_seen()
        progress.step()
