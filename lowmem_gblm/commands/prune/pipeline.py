"""The whole run on one page: read this first.

`prune` streams the decoder blocks up to three times and writes each pruned block the moment it is
done. Which passes run follows from what the method needs (`schedule`).

    embed     every sample through the embeddings
    dry_run   in place: one sample through all blocks, before one of them is overwritten
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

from lowmem_gblm.commands.estimate import speeds_of
from lowmem_gblm.commands.prune.record import record
from lowmem_gblm.commands.prune.session import SweepContext, begin_or_resume
from lowmem_gblm.commands.prune.setup import PruneSetup, open_setup
from lowmem_gblm.commands.request import PruneRequest, check_places, output_folder, work_folder
from lowmem_gblm.errors import RequestError
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.matmul_tap import MatmulWeight
from lowmem_gblm.planning import FLOAT32_BYTES, Plan, slices_within
from lowmem_gblm.runtime import memory
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.runtime.signals import StopFlag
from lowmem_gblm.runtime.watchdog import HostWatch
from lowmem_gblm.storage.checkpoint.writer import check_absent
from lowmem_gblm.storage.in_place import check_confirmed, check_unpruned
from lowmem_gblm.storage.job import forget_finished
from lowmem_gblm.storage.locking import in_use
from lowmem_gblm.sweeps.dense import boundary, dense_sweep, embed, head_pass, learn_calls
from lowmem_gblm.sweeps.dry_run import dry_run
from lowmem_gblm.sweeps.prune import prune_sweep
from lowmem_gblm.sweeps.reverse import reverse_sweep
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic

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
            see `lowmem_gblm.storage.in_place`.
    """
    _check_place(request)
    memory.reset_host_peak()
    memory.settle_allocator()
    setup = open_setup(request)
    with in_use(setup.opened.checkpoint.folder, alone=request.in_place):
        # Until now another process may have worked on the same.
        _check_place(request)
        setup.check_whole()
        return _run_passes(setup, listener)


def _run_passes(setup: PruneSetup, listener: Listener | None) -> dict[str, Any]:
    """Everything that follows when the model is open, and stays what it is."""
    device = setup.opened.streamed.device
    memory.reset_gpu_peak(device)
    memory.settle_allocator(setup.opened.boundary_bytes(setup.seqlen))
    if setup.budget.gpu_bytes is not None:
        memory.limit_gpu(device, setup.budget.gpu_bytes)
    planned_bytes = setup.plan.predicted.host_bytes
    stop = StopFlag()
    with (
        HostWatch(setup.budget.host_bytes, stop, planned_bytes=planned_bytes),
        begin_or_resume(setup, listener, stop) as run,
    ):
        for name in setup.schedule.passes:
            with run.progress.stage(name):
                run.progress.skip(run.done(name), whole=name in ("embed", "dry_run", "head"))
                _PASSES[name](run)
        with run.progress.stage("finish"):
            run.settle()
            run.output.write_rest(run.progress.check)
            run.progress.step()
        made = record(setup, run.pruner, run.samples, run.losses, run.progress, run.output, run.job)
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
    setup = open_setup(request, to_plan=True)
    made = setup.plan
    if measured:
        made = setup.planned(
            speeds_of(setup.opened, setup.weights, setup.seqlen, setup.work_folder)
        )
    if not setup.opened.checkpoint.on_disk:
        made = replace(made, reasons=(*made.reasons, _DESCRIBED))
    return made


def _check_place(request: PruneRequest) -> None:
    """Raise unless the result may be put where it is to go; clear away a finished job."""
    check_places(request)
    if request.in_place:
        check_confirmed(request.model, confirmed=request.overwrite_my_only_copy)
    elif request.output is None:
        raise RequestError("prune needs an OUTPUT folder, or --in-place to overwrite MODEL itself")
    output = output_folder(request)
    forget_finished(output, work_folder(request))
    if request.in_place:
        check_unpruned(output)
    else:
        check_absent(output)


def _embed(run: SweepContext) -> None:
    streamed, samples_NT = run.setup.opened.streamed, run.setup.samples
    with streamed.filled(run.setup.opened.checkpoint):
        if run.done("embed"):
            learn_calls(streamed, samples_NT)
        else:
            embed(streamed, samples_NT, run.offload, run.progress)
            run.commit("embed", [])


def _dry_run(run: SweepContext) -> None:
    if run.done("dry_run"):
        return
    dry_run(
        run.blocks,
        run.setup.opened.streamed,
        run.offload,
        run.progress,
        runs_samples=run.setup.schedule.needs_samples,
    )
    run.commit("dry_run", [])


def _dense(run: SweepContext) -> None:
    dense_sweep(
        run.blocks,
        run.setup.opened.streamed,
        run.offload,
        run.samples,
        run.progress,
        boundary_interval=run.setup.plan.choices.boundary_interval,
        first=run.done("dense"),
        commit=partial(run.commit, "dense"),
    )


def _head(run: SweepContext) -> None:
    if run.done("head"):
        return
    streamed, samples_NT = run.setup.opened.streamed, run.setup.samples
    with streamed.filled(run.setup.opened.checkpoint):
        run.losses = head_pass(
            streamed,
            samples_NT,
            run.samples,
            run.offload,
            run.setup.loss_scale,
            run.progress,
        )
    run.commit("head", [boundary("dense", streamed.depth)])


def _reverse(run: SweepContext) -> None:
    """Gradient magnitudes of every block, kept for `_prune`; or pruned and written at once."""
    choices = run.setup.plan.choices
    prunes = run.setup.schedule.prune_in == "reverse"
    # A job that has begun with rounded magnitudes goes on with them.
    whole = choices.accumulator_bytes is None and choices.gradient_precision == "float32"
    held: dict[MatmulWeight, Tensor] = {}

    def slices(block: Block) -> list[list[MatmulWeight]]:
        sizes = [slot.stored(block.module).numel() * FLOAT32_BYTES for slot in block.slots]
        parts = slices_within(sizes, choices.accumulator_bytes)
        return [[block.slots[item] for item in part] for part in parts]

    def keep(block: Block, gradients: dict[MatmulWeight, Tensor]) -> None:
        if prunes and whole:
            held.update(gradients)
        else:
            run.gradients.keep(block, gradients)

    def finish(block: Block, measured: Sequence[ActivationStatistic]) -> list[str]:
        if not prunes:
            return []
        run.pruner.prune(block, measured, held.get if whole else partial(run.gradients.of, block))
        held.clear()
        run.write(block)
        return run.gradients.names(block)

    reverse_sweep(
        run.blocks,
        run.setup.opened.streamed,
        run.offload,
        run.samples,
        run.setup.gradient_norm,
        run.setup.loss_scale,
        run.progress,
        boundary_interval=choices.boundary_interval,
        slices=slices,
        activations=run.activations if prunes else lambda count: [],
        keep=keep,
        finish=finish,
        first=run.done("reverse"),
        commit=partial(run.commit, "reverse"),
    )


def _prune(run: SweepContext) -> None:
    def finish(block: Block, measured: Sequence[ActivationStatistic]) -> list[str]:
        run.pruner.prune(block, measured, partial(run.gradients.of, block))
        run.write(block)
        return run.gradients.names(block)

    prune_sweep(
        run.blocks,
        run.setup.opened.streamed,
        run.offload,
        run.samples,
        run.setup.schedule.prune_forwards,
        run.progress,
        activations=run.activations,
        finish=finish,
        first=run.done("prune"),
        commit=partial(run.commit, "prune"),
    )


_PASSES = {
    "embed": _embed,
    "dry_run": _dry_run,
    "dense": _dense,
    "head": _head,
    "reverse": _reverse,
    "prune": _prune,
}
