"""The record of a run, `pruning.json`: what was asked, what was measured, with what."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from lowmem_gblm.commands.prune.identity import device_name, identity, versions
from lowmem_gblm.commands.prune.setup import PruneSetup
from lowmem_gblm.planning.schedule import reverse_order
from lowmem_gblm.runtime import memory
from lowmem_gblm.runtime.progress import Progress, Stage
from lowmem_gblm.storage.in_place import BlockWriter
from lowmem_gblm.storage.job import Job
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from lowmem_gblm.sweeps.sample_set import SampleSet

_WORTH_A_NOTE = 0.01


def stages(setup: PruneSetup) -> list[Stage]:
    """The stages of a run, with what each costs in FLOPs: the time left follows from that."""
    block_cost = max(1, setup.plan.flops)
    shares = setup.schedule.flop_shares
    per_share = block_cost / max(1, setup.schedule.flops_per_parameter_and_token)
    nsamples, depth = len(setup.samples), setup.opened.streamed.depth
    blocks = {"reverse": len(reverse_order(depth, setup.plan.choices.boundary_interval))}
    found = [
        Stage(
            name=name,
            steps=nsamples if name in ("embed", "head") else blocks.get(name, depth),
            cost=shares.get(name, 0) * per_share,
        )
        for name in setup.schedule.passes
    ]
    return [*found, Stage(name="finish", steps=1, cost=0)]


def record(
    setup: PruneSetup,
    pruner: BlockPruner,
    samples: SampleSet,
    losses: list[float],
    progress: Progress,
    output: BlockWriter,
    job: Job,
) -> dict[str, Any]:
    """The content of pruning.json."""
    checkpoint = setup.opened.checkpoint
    device = setup.opened.streamed.device
    numel = sum(math.prod(one["shape"]) for one in pruner.tensors.values())
    tensors = {name: pruner.tensors[name] for name in checkpoint.tensors if name in pruner.tensors}
    return {
        "model": setup.request.model,
        **identity(setup.request, setup.opened, setup.seqlen),
        "group": setup.method.group,
        "updates_weights": setup.method.updates_weights,
        "sparsity_measured": sum(one["zeros"] for one in tensors.values()) / numel,
        "calibration_loss": sum(losses) / len(losses) if losses else None,
        "notes": [
            *_other_rounding(job, device_name(device)),
            *setup.plan.reasons,
            *_unused(setup),
            *_dense(setup),
            *samples.notes(),
            *pruner.notes,
        ],
        "dropped_samples": samples.dropped,
        "tensors": tensors,
        "seconds": {**progress.seconds, "total": progress.total_seconds()},
        "waited_seconds": progress.waited_seconds,
        "memory": {
            "host_peak_bytes": memory.host_peak_bytes(),
            "host_planned_bytes": setup.plan.predicted.host_bytes,
            "gpu_peak_bytes": memory.gpu_peak_bytes(device),
            "gpu_planned_bytes": setup.plan.predicted.gpu_bytes,
        },
        "bytes": {"read": checkpoint.bytes_read, "written": output.bytes_written},
        "choices": asdict(setup.plan.choices),
        "flops": setup.plan.flops,
        "versions": versions(),
        "fingerprints": setup.fingerprints,
        "shards": output.shards,
        "job": job.id,
        "attempts": job.attempts,
    }


def _other_rounding(job: Job, here: str) -> list[str]:
    """A sentence about a job that was gone on with on another device."""
    devices = list(dict.fromkeys([*(entry["device"] for entry in job.entries), here]))
    if len(devices) == 1:
        return []
    others = ", then on ".join(devices[1:])
    return [f"begun on {devices[0]} and continued on {others}: the rounding of all is in it"]


def _unused(setup: PruneSetup) -> list[str]:
    """A sentence about tensors that the model does not use."""
    streamed = setup.opened.streamed
    used = {name for names in [*streamed.block_tensors, streamed.rest_tensors] for name in names}
    unused = [name for name in setup.opened.checkpoint.tensors if name not in used]
    if not unused:
        return []
    return [f"{len(unused)} tensors are no part of the model and stay as they are: {unused[0]}"]


def _dense(setup: PruneSetup) -> list[str]:
    """A sentence about matrices inside decoder blocks that stay dense, unless they are few."""
    pruned = {weight.name for block in setup.weights for weight in block}
    sizes = {
        name: math.prod(setup.opened.checkpoint.tensors[name].shape)
        for names in setup.opened.streamed.block_tensors
        for name in names
        if len(setup.opened.checkpoint.tensors[name].shape) > 1
    }
    dense = [name for name in sizes if name not in pruned]
    share = sum(sizes[name] for name in dense) / sum(sizes.values())
    if share < _WORTH_A_NOTE:
        return []
    return [
        f"{len(dense)} matrices inside decoder blocks ({share:.1%} of their weights) stay dense: "
        f"{dense[0]}"
    ]
