"""The record of a run, `pruning.json`: what was asked, what was measured, with what."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from lowmem_gblm import memory
from lowmem_gblm.disk.in_place import Target
from lowmem_gblm.disk.job import Job
from lowmem_gblm.identity import device_name, identity, versions
from lowmem_gblm.progress import Progress, Stage
from lowmem_gblm.schedule import reverse_order
from lowmem_gblm.sweeps.decide import Pruner
from lowmem_gblm.sweeps.samples import Samples
from lowmem_gblm.workbench import Workbench

_WORTH_A_NOTE = 0.01


def stages(bench: Workbench) -> list[Stage]:
    """The stages of a run, with what each costs in FLOPs: the time left follows from that."""
    block_cost = max(1, bench.plan.flops)
    shares = bench.schedule.flop_shares
    per_share = block_cost / max(1, bench.schedule.flops_per_parameter_and_token)
    nsamples, depth = len(bench.samples), bench.opened.skeleton.depth
    blocks = {"reverse": len(reverse_order(depth, bench.plan.choices.keep_every))}
    found = [
        Stage(
            name=name,
            steps=nsamples if name in ("embed", "head") else blocks.get(name, depth),
            cost=shares.get(name, 0) * per_share,
        )
        for name in bench.schedule.passes
    ]
    return [*found, Stage(name="finish", steps=1, cost=0)]


def record(
    bench: Workbench,
    pruner: Pruner,
    samples: Samples,
    losses: list[float],
    progress: Progress,
    output: Target,
    job: Job,
) -> dict[str, Any]:
    """The content of pruning.json."""
    checkpoint = bench.opened.checkpoint
    device = bench.opened.skeleton.device
    numel = sum(math.prod(one["shape"]) for one in pruner.tensors.values())
    tensors = {name: pruner.tensors[name] for name in checkpoint.tensors if name in pruner.tensors}
    return {
        "model": bench.request.model,
        **identity(bench.request, bench.opened, bench.seqlen),
        "group": bench.method.group,
        "updates_weights": bench.method.updates_weights,
        "sparsity_measured": sum(one["zeros"] for one in tensors.values()) / numel,
        "calibration_loss": sum(losses) / len(losses) if losses else None,
        "notes": [
            *_other_rounding(job, device_name(device)),
            *bench.plan.reasons,
            *_unused(bench),
            *_dense(bench),
            *samples.notes(),
            *pruner.notes,
        ],
        "dropped_samples": samples.dropped,
        "tensors": tensors,
        "seconds": {**progress.seconds, "total": progress.total_seconds()},
        "waited_seconds": progress.waited_seconds,
        "memory": {
            "host_peak_bytes": memory.host_peak_bytes(),
            "host_planned_bytes": bench.plan.predicted.host_bytes,
            "gpu_peak_bytes": memory.gpu_peak_bytes(device),
            "gpu_planned_bytes": bench.plan.predicted.gpu_bytes,
        },
        "bytes": {"read": checkpoint.bytes_read, "written": output.bytes_written},
        "choices": asdict(bench.plan.choices),
        "flops": bench.plan.flops,
        "versions": versions(),
        "fingerprints": bench.fingerprints,
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


def _unused(bench: Workbench) -> list[str]:
    """A sentence about tensors that the model does not use."""
    skeleton = bench.opened.skeleton
    used = {name for names in [*skeleton.block_tensors, skeleton.rest_tensors] for name in names}
    unused = [name for name in bench.opened.checkpoint.tensors if name not in used]
    if not unused:
        return []
    return [f"{len(unused)} tensors are no part of the model and stay as they are: {unused[0]}"]


def _dense(bench: Workbench) -> list[str]:
    """A sentence about matrices inside decoder blocks that stay dense, unless they are few."""
    pruned = {weight.name for block in bench.weights for weight in block}
    sizes = {
        name: math.prod(bench.opened.checkpoint.tensors[name].shape)
        for names in bench.opened.skeleton.block_tensors
        for name in names
        if len(bench.opened.checkpoint.tensors[name].shape) > 1
    }
    dense = [name for name in sizes if name not in pruned]
    share = sum(sizes[name] for name in dense) / sum(sizes.values())
    if share < _WORTH_A_NOTE:
        return []
    return [
        f"{len(dense)} matrices inside decoder blocks ({share:.1%} of their weights) stay dense: "
        f"{dense[0]}"
    ]
