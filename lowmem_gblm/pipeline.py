"""The whole run on one page: read this first.

`prune` streams the decoder blocks up to three times and writes each pruned block the moment it is
done. Which passes run follows from what the method needs (`schedule`).

    embed     every sample through the embeddings
    dense     first block to last: forward, keeping every boundary
    head      norm, head and loss: the gradient of the loss at the last boundary
    reverse   last block to first: forward again and backward, gradient magnitudes
    prune     first block to last: activations of the model pruned so far, decide, write, go on
    finish    what lies outside the blocks, side files, pruning.json, index, one rename
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowmem_gblm import memory
from lowmem_gblm.disk.output import Output, check_absent
from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.errors import RequestError
from lowmem_gblm.model.blocks import Block, BlockStream
from lowmem_gblm.model.tap import Slot
from lowmem_gblm.planning import Plan, check_fits
from lowmem_gblm.progress import Listener, Progress
from lowmem_gblm.report import record, stages
from lowmem_gblm.request import PruneRequest
from lowmem_gblm.stats.activation import ActivationStatistic, activation_statistics
from lowmem_gblm.sweeps.decide import Pruner, drop_gradients, store_gradients, stored_gradients
from lowmem_gblm.sweeps.dense import dense_sweep, embed, head_pass
from lowmem_gblm.sweeps.prune import prune_sweep
from lowmem_gblm.sweeps.reverse import reverse_sweep
from lowmem_gblm.workbench import Workbench, open_workbench, work_folder


@dataclass(kw_only=True)
class Run:
    """What the passes of one run work with."""

    bench: Workbench
    blocks: BlockStream
    spill: Spill
    output: Output
    pruner: Pruner
    progress: Progress
    losses: list[float] = field(default_factory=list)

    def activations(self) -> list[ActivationStatistic]:
        """Fresh accumulators for one block."""
        return activation_statistics(self.bench.method.needs, len(self.bench.samples))


def prune(request: PruneRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Prune a model into a new checkpoint.

    Args:
        request: What is asked.
        listener: Told of every step.

    Returns:
        The content of OUTPUT/pruning.json.

    Raises:
        LowmemGblmError: See `lowmem_gblm.errors`; nothing is left under the name OUTPUT.
    """
    if request.output is None:
        raise RequestError("prune needs an OUTPUT folder")
    check_absent(request.output)
    memory.reset_host_peak()
    memory.settle_allocator()
    bench = open_workbench(request)
    memory.reset_gpu_peak(bench.opened.skeleton.device)
    memory.settle_allocator(bench.opened.boundary_bytes(bench.seqlen))
    check_fits(bench.plan, bench.budget)
    checkpoint, skeleton = bench.opened.checkpoint, bench.opened.skeleton
    progress = Progress(stages(bench), listener)
    with (
        Spill(work_folder(request, request.output), bench.plan.host_spill_bytes) as spill,
        Output(request.output, checkpoint, skeleton.block_tensors) as output,
    ):
        run = Run(
            bench=bench,
            blocks=BlockStream(checkpoint, skeleton, bench.weights),
            spill=spill,
            output=output,
            pruner=Pruner(bench.method, request.target, request.alpha, skeleton.device),
            progress=progress,
        )
        for name in bench.schedule.passes:
            with progress.stage(name):
                _PASSES[name](run)
        with progress.stage("finish"):
            output.write_rest()
            progress.step()
        return output.publish(record(bench, run.pruner, run.losses, progress, output))


def make_plan(request: PruneRequest) -> Plan:
    """What a run would take, from headers alone.

    Raises:
        BudgetError: It does not fit what may be used.
        LowmemGblmError: The request is bad, or the model cannot be used.
    """
    bench = open_workbench(request)
    check_fits(bench.plan, bench.budget)
    return bench.plan


def _embed(run: Run) -> None:
    skeleton = run.bench.opened.skeleton
    skeleton.fill(run.bench.opened.checkpoint)
    embed(skeleton, run.bench.samples, run.spill, run.progress)


def _dense(run: Run) -> None:
    skeleton, nsamples = run.bench.opened.skeleton, len(run.bench.samples)
    dense_sweep(run.blocks, skeleton, run.spill, nsamples, run.progress, keep=True)


def _head(run: Run) -> None:
    skeleton, samples_NT = run.bench.opened.skeleton, run.bench.samples
    scale = run.bench.loss_scale
    run.losses = head_pass(skeleton, samples_NT, run.spill, run.blocks.depth, scale, run.progress)


def _reverse(run: Run) -> None:
    """Gradient magnitudes of every block: pruned and written at once, or kept for `_prune`."""
    prunes = run.bench.schedule.prune_in == "reverse"

    def finish(
        block: Block, gradients: dict[Slot, Tensor], measured: Sequence[ActivationStatistic]
    ) -> None:
        if prunes:
            run.pruner.prune(block, measured, gradients.get)
            run.output.write_block(block.index, block.raw)
        else:
            store_gradients(run.spill, block, gradients)

    reverse_sweep(
        run.blocks,
        run.bench.opened.skeleton,
        run.spill,
        len(run.bench.samples),
        run.bench.gradient_norm,
        run.bench.loss_scale,
        run.progress,
        keep_raw=prunes,
        activations=run.activations if prunes else list,
        finish=finish,
    )


def _prune(run: Run) -> None:
    def finish(block: Block, measured: Sequence[ActivationStatistic]) -> None:
        run.pruner.prune(block, measured, stored_gradients(run.spill, block))
        run.output.write_block(block.index, block.raw)
        drop_gradients(run.spill, block)

    prune_sweep(
        run.blocks,
        run.bench.opened.skeleton,
        run.spill,
        len(run.bench.samples),
        run.bench.schedule.prune_forwards,
        run.progress,
        activations=run.activations,
        finish=finish,
    )


_PASSES = {
    "embed": _embed,
    "dense": _dense,
    "head": _head,
    "reverse": _reverse,
    "prune": _prune,
}
