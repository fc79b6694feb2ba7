"""The record of a run, `pruning.json`: what was asked, what was measured, with what."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.prune.identity import FINGERPRINTS, asked_and_understood, versions
from lowmem_gblm.commands.prune.reuse import reuse_notes, rounded_to
from lowmem_gblm.commands.prune.scope import PruneScope
from lowmem_gblm.commands.prune.setup import PruneSetup
from lowmem_gblm.commands.recipe import recipe_of
from lowmem_gblm.planning.sizes import stores
from lowmem_gblm.runtime import memory
from lowmem_gblm.runtime.accelerator import peak_bytes
from lowmem_gblm.storage.hub import public_name
from lowmem_gblm.storage.job import Job
from lowmem_gblm.storage.statistics_folder import CALIBRATION
from lowmem_gblm.sweeps.context import PruneContext
from lowmem_gblm.sweeps.option_search import OptionSearch

_WORTH_A_NOTE = 0.01


def run_record(setup: PruneSetup, run: PruneContext) -> dict[str, Any]:
    """Return the content of pruning.json."""
    scope, pruner, predicted = setup.scope, run.pruner, setup.plan.predicted
    numel = sum(math.prod(one["shape"]) for one in pruner.tensors.values())
    names = [name for name in run.checkpoint.tensors if name in pruner.tensors]
    tensors = {name: pruner.tensors[name] for name in names}
    device, understood = run.model.device, asked_and_understood(scope)
    recipe = recipe_of(scope.request, understood)
    return {
        # Names only: a path of this machine says nothing elsewhere, and may say too much.
        "model": public_name(scope.request.model),
        "recipe": recipe,
        **understood,
        "calibration": recipe["calibration"],
        "group": scope.method.group,
        "updates_weights": scope.method.updates_weights,
        "sparsity_measured": sum(one["zeros"] for one in tensors.values()) / numel,
        "calibration_loss": sum(run.losses) / len(run.losses) if run.losses else None,
        "search": _search(scope, run.search),
        "notes": [
            *_other_rounding(run.job, run.device_name),
            *setup.plan.reasons,
            *setup.samples.notes,
            *reuse_notes(scope.saved, scope.taken, scope.statistics),
            *run.search.notes(scope.work.held_out),
            *_unused(scope),
            *_dense(scope),
            *run.samples.notes(),
            *run.pruner.notes,
        ],
        "dropped_samples": run.samples.dropped,
        "statistics": {
            "measured": scope.statistics.names,
            "taken": scope.taken.names,
            "taken_from": _name(scope.request.statistics) if scope.taken.classes else None,
            "taken_rounded_to": rounded_to(scope.saved, scope.taken),
            "saved_in": _name(setup.paths.statistics),
        },
        "tensors": tensors,
        "seconds": {**run.progress.seconds, "total": run.progress.total_seconds()},
        "waited_seconds": run.progress.waited_seconds,
        "memory": {
            "host_peak_bytes": memory.host_peak_bytes(),
            "host_planned_bytes": predicted.host_bytes,
            "gpu_peak_bytes": peak_bytes(device),
            "gpu_planned_bytes": predicted.gpu_bytes,
        },
        "bytes": {
            "read": run.checkpoint.bytes_read + run.taken.bytes_read,
            "written": run.output.bytes_written
            + (0 if run.saver is None else run.saver.writer.bytes_written),
        },
        "bytes_planned": {
            "read": setup.plan.read_bytes,
            "written": setup.plan.output_bytes + setup.plan.statistics_bytes,
        },
        "choices": asdict(setup.plan.choices),
        "flops": setup.plan.flops,
        "versions": versions(),
        "fingerprints": {name: setup.identity[name] for name in FINGERPRINTS},
        "shards": run.output.shards,
        "job": run.job.id,
        "attempts": run.job.attempts,
    }


def saved_manifest(setup: PruneSetup, run: PruneContext) -> dict[str, Any]:
    """Return what the statistics that a run saves are of."""
    scope, choices = setup.scope, setup.plan.choices
    gradient, activations = scope.statistics.gradient, scope.request.activations
    stored = gradient is not None and stores(scope.work, choices)
    return {
        "streams": {
            **{kind.name: activations for kind in scope.statistics.activations},
            **({} if gradient is None else {gradient.name: "dense"}),
        },
        "precision": scope.magnitude_precision,
        "stored_precision": choices.gradient_precision if stored else "float32",
        "loss_scale": scope.loss_scale,
        "calibration": {
            **{name: getattr(scope.request, name) for name in CALIBRATION},
            "calibration": scope.request.calibration_text,
            "seqlen": scope.work.seqlen,
        },
        "dropped_samples": run.samples.dropped,
        "identity": setup.identity,
    }


def _search(scope: PruneScope, search: OptionSearch) -> dict[str, Any] | None:
    """Return what was chosen for the options that are "auto", and the losses that decided."""
    if not search.candidates:
        return None
    losses = zip(search.values, search.losses, strict=True)
    return {
        "chosen": search.values[search.chosen],
        "held_out_windows": scope.work.held_out,
        "candidates": [{**values, "loss": loss} for values, loss in losses],
    }


def _name(folder: Path | None) -> str | None:
    return None if folder is None else public_name(str(folder))


def _other_rounding(job: Job, here: str) -> list[str]:
    devices = list(dict.fromkeys([*(entry["device"] for entry in job.entries), here]))
    if len(devices) == 1:
        return []
    others = ", then on ".join(devices[1:])
    return [f"begun on {devices[0]} and continued on {others}: the rounding of all is in it"]


def _unused(scope: PruneScope) -> list[str]:
    streamed = scope.model.streamed
    used = {name for names in [*streamed.block_tensors, streamed.rest_tensors] for name in names}
    unused = [name for name in scope.model.checkpoint.tensors if name not in used]
    if not unused:
        return []
    return [f"{len(unused)} tensors are no part of the model and stay as they are: {unused[0]}"]


def _dense(scope: PruneScope) -> list[str]:
    pruned = {weight.name for block in scope.weights for weight in block}
    sizes = {
        name: math.prod(scope.model.checkpoint.tensors[name].shape)
        for names in scope.model.streamed.block_tensors
        for name in names
        if len(scope.model.checkpoint.tensors[name].shape) > 1
    }
    dense = [name for name in sizes if name not in pruned]
    share = sum(sizes[name] for name in dense) / sum(sizes.values())
    if share < _WORTH_A_NOTE:
        return []
    return [
        f"{len(dense)} matrices inside decoder blocks ({share:.1%} of their weights) stay dense: "
        f"{dense[0]}"
    ]
