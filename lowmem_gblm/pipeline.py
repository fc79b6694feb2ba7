"""The whole run on one page: read this first.

`prune` streams the decoder blocks up to three times and writes each pruned block the moment it is
done. Which passes run follows from what the method needs (`schedule`).

    embed     every sample through the embeddings
    rehearse  in place: one sample through all blocks, before one of them is overwritten
    dense     first block to last: forward, keeping every boundary
    head      norm, head and loss: the gradient of the loss at the last boundary
    reverse   last block to first: forward again and backward, gradient magnitudes
    prune     first block to last: activations of the model pruned so far, decide, write, go on
    finish    what lies outside the blocks, side files, pruning.json, index, one rename
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lowmem_gblm import memory
from lowmem_gblm.disk.folder import in_use
from lowmem_gblm.disk.in_place import check_confirmed, check_unpruned
from lowmem_gblm.disk.job import forget_finished
from lowmem_gblm.disk.output import check_absent
from lowmem_gblm.errors import RequestError
from lowmem_gblm.forecast import speeds_of
from lowmem_gblm.model.stream import Block
from lowmem_gblm.model.tap import Slot
from lowmem_gblm.planning import FLOAT32_BYTES, Plan, slices_within
from lowmem_gblm.progress import Listener
from lowmem_gblm.report import record
from lowmem_gblm.request import (
    PruneRequest,
    check_places,
    output_folder,
    work_folder,
)
from lowmem_gblm.run import Run, begin_or_resume
from lowmem_gblm.stats.activation import ActivationStatistic
from lowmem_gblm.sweeps.dense import boundary, dense_sweep, embed, head_pass, learn_calls
from lowmem_gblm.sweeps.prune import prune_sweep
from lowmem_gblm.sweeps.rehearsal import rehearse
from lowmem_gblm.sweeps.reverse import reverse_sweep
from lowmem_gblm.watchdog import HostWatch
from lowmem_gblm.workbench import Workbench, open_workbench

_DESCRIBED = "the weights are not here: their sizes are those that config.json describes"


def prune(request: PruneRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Prune a model into a new checkpoint, or in place.

    Args:
        request: What is asked.
        listener: Told of every step.

    Returns:
        The content of OUTPUT/pruning.json; in place, of MODEL/pruning.json.

    Raises:
        LowmemGblmError: See `lowmem_gblm.errors`; nothing is left under the name OUTPUT. In place
            see `lowmem_gblm.disk.in_place`.
    """
    _check_place(request)
    memory.reset_host_peak()
    memory.settle_allocator()
    bench = open_workbench(request)
    with in_use(bench.opened.checkpoint.folder, alone=request.in_place):
        # Until now another process may have worked on the same.
        _check_place(request)
        bench.check_whole()
        return _run_passes(bench, listener)


def _run_passes(bench: Workbench, listener: Listener | None) -> dict[str, Any]:
    """Everything that follows when the model is open, and stays what it is."""
    device = bench.opened.skeleton.device
    memory.reset_gpu_peak(device)
    memory.settle_allocator(bench.opened.boundary_bytes(bench.seqlen))
    if bench.budget.gpu_bytes is not None:
        memory.limit_gpu(device, bench.budget.gpu_bytes)
    planned_bytes = bench.plan.predicted.host_bytes
    with (
        HostWatch(bench.budget.host_bytes, planned_bytes=planned_bytes) as watch,
        begin_or_resume(bench, listener, watch.check) as run,
    ):
        for name in bench.schedule.passes:
            with run.progress.stage(name):
                run.progress.skip(run.done(name), whole=name in ("embed", "rehearse", "head"))
                _PASSES[name](run)
        with run.progress.stage("finish"):
            run.settle()
            run.output.write_rest()
            run.progress.step()
        made = record(bench, run.pruner, run.samples, run.losses, run.progress, run.output, run.job)
        return run.publish(made)


def make_plan(request: PruneRequest, *, measured: bool = True) -> Plan:
    """What a run would take; neither the weights nor the device need be here.

    Args:
        request: What is asked.
        measured: Whether to measure this machine for about two seconds, for the time.

    Raises:
        BudgetError: It does not fit what may be used.
        LowmemGblmError: The request is bad, or the model cannot be used.
    """
    bench = open_workbench(request, to_plan=True)
    made = bench.plan
    if measured:
        made = bench.planned(
            speeds_of(bench.opened, bench.weights, bench.seqlen, bench.work_folder)
        )
    if not bench.opened.checkpoint.on_disk:
        made = replace(made, reasons=(*made.reasons, _DESCRIBED))
    return made


def _check_place(request: PruneRequest) -> None:
    """Raise unless the result may be put where it is to go; clear away a finished job."""
    check_places(request)
    if request.in_place:
        check_confirmed(request)
    elif request.output is None:
        raise RequestError("prune needs an OUTPUT folder, or --in-place to overwrite MODEL itself")
    output = output_folder(request)
    forget_finished(output, work_folder(request))
    if request.in_place:
        check_unpruned(output)
    else:
        check_absent(output)


def _embed(run: Run) -> None:
    skeleton, samples_NT = run.bench.opened.skeleton, run.bench.samples
    with skeleton.filled(run.bench.opened.checkpoint):
        if run.done("embed"):
            learn_calls(skeleton, samples_NT)
        else:
            embed(skeleton, samples_NT, run.conveyor, run.progress)
            run.commit("embed", [])


def _rehearse(run: Run) -> None:
    if run.done("rehearse"):
        return
    rehearse(
        run.blocks,
        run.bench.opened.skeleton,
        run.conveyor,
        run.progress,
        runs_samples=run.bench.schedule.needs_samples,
    )
    run.commit("rehearse", [])


def _dense(run: Run) -> None:
    dense_sweep(
        run.blocks,
        run.bench.opened.skeleton,
        run.conveyor,
        run.samples,
        run.progress,
        keep_every=run.bench.plan.choices.keep_every,
        first=run.done("dense"),
        commit=partial(run.commit, "dense"),
    )


def _head(run: Run) -> None:
    if run.done("head"):
        return
    skeleton, samples_NT = run.bench.opened.skeleton, run.bench.samples
    with skeleton.filled(run.bench.opened.checkpoint):
        run.losses = head_pass(
            skeleton,
            samples_NT,
            run.samples,
            run.conveyor,
            run.bench.loss_scale,
            run.progress,
        )
    run.commit("head", [boundary("dense", skeleton.depth)])


def _reverse(run: Run) -> None:
    """Gradient magnitudes of every block, kept for `_prune`; or pruned and written at once."""
    choices = run.bench.plan.choices
    prunes = run.bench.schedule.prune_in == "reverse"
    # A job that has begun with rounded magnitudes goes on with them.
    whole = choices.accumulator_bytes is None and choices.store == "float32"
    held: dict[Slot, Tensor] = {}

    def slices(block: Block) -> list[list[Slot]]:
        sizes = [slot.stored(block.module).numel() * FLOAT32_BYTES for slot in block.slots]
        parts = slices_within(sizes, choices.accumulator_bytes)
        return [[block.slots[item] for item in part] for part in parts]

    def keep(block: Block, gradients: dict[Slot, Tensor]) -> None:
        if prunes and whole:
            held.update(gradients)
        else:
            run.magnitudes.keep(block, gradients)

    def finish(block: Block, measured: Sequence[ActivationStatistic]) -> list[str]:
        if not prunes:
            return []
        run.pruner.prune(block, measured, held.get if whole else partial(run.magnitudes.of, block))
        held.clear()
        run.write(block)
        return run.magnitudes.names(block)

    reverse_sweep(
        run.blocks,
        run.bench.opened.skeleton,
        run.conveyor,
        run.samples,
        run.bench.gradient_norm,
        run.bench.loss_scale,
        run.progress,
        kept_every=choices.keep_every,
        slices=slices,
        activations=run.activations if prunes else lambda count: [],
        keep=keep,
        finish=finish,
        first=run.done("reverse"),
        commit=partial(run.commit, "reverse"),
    )


def _prune(run: Run) -> None:
    def finish(block: Block, measured: Sequence[ActivationStatistic]) -> list[str]:
        run.pruner.prune(block, measured, partial(run.magnitudes.of, block))
        run.write(block)
        return run.magnitudes.names(block)

    prune_sweep(
        run.blocks,
        run.bench.opened.skeleton,
        run.conveyor,
        run.samples,
        run.bench.schedule.prune_forwards,
        run.progress,
        activations=run.activations,
        finish=finish,
        first=run.done("prune"),
        commit=partial(run.commit, "prune"),
    )


_PASSES = {
    "embed": _embed,
    "rehearse": _rehearse,
    "dense": _dense,
    "head": _head,
    "reverse": _reverse,
    "prune": _prune,
}
