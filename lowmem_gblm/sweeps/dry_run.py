"""Before a model is overwritten: one sample through all of it, while it is still complete."""

import torch

from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.sweeps.context import PruneContext


@torch.no_grad()
def dry_run(run: PruneContext) -> None:
    """Read every block, and run the first sample through it where samples are run at all."""
    for step in run.steps("dry_run"):
        hidden = None
        if step.reads:
            ((_, (hidden,)),) = run.offload.prefetch(step.reads, [0])
        for block in run.loader.stream(range(run.model.depth)):
            if hidden is not None:
                tap = Tap(block.module, block.slots, [])
                hidden = run.model.forward_block(block.index, hidden, tap)
                tap.check_all_seen()
            run.progress.step()
