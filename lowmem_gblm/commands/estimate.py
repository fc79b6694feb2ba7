"""From an opened model and a request to a plan: sizes, work, budget, speeds."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.methods import AT_ONCE, Method
from lowmem_gblm.model.open_model import OpenModel
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.model.streamed_model import HEAD_LOGITS
from lowmem_gblm.planning import (
    ActivationCost,
    Budget,
    DecisionCost,
    MachineSpeed,
    ModelSizes,
    Plan,
    Workload,
    gibibytes,
)
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.planning.schedule import Schedule
from lowmem_gblm.runtime import machine
from lowmem_gblm.runtime.benchmark import (
    flops_rate,
    memory_rate,
    probe_bytes,
    read_rate,
    write_rate,
)
from lowmem_gblm.runtime.memory import give_back_freed
from lowmem_gblm.storage.checkpoint.file_access import side_files
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.writer import partial_folder
from lowmem_gblm.storage.locking import size_on_disk
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from lowmem_gblm.sweeps.statistics.gradient import TILE

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_OUTPUT_PROJECTION = re.compile(r"(^|\.)(o|out|down|c|w2|fc2|wo|dense\w*h)(_?proj|_lin)?$|dense$")
_TOLD_PER_TENSOR = 1000
_RESIDENT_BITS = {"auto": None, "int8": 8, "nf4": 4}


def sizes_of(opened: OpenModel, weights: Sequence[list[PrunableWeight]]) -> ModelSizes:
    """Return the sizes that memory and work follow from."""
    checkpoint, streamed = opened.checkpoint, opened.streamed
    every = [weight for block in weights for weight in block]
    fraction = _active_fraction(opened, every)
    largest = max(range(len(weights)), key=lambda index: _numel(weights[index]))
    slots = list(dict.fromkeys(weight.slot for weight in weights[largest]))
    return ModelSizes(
        block_bytes=tuple(checkpoint.nbytes(names) for names in streamed.block_tensors),
        rest_bytes=checkpoint.nbytes(streamed.rest_tensors),
        rest_weights=sum(
            math.prod(checkpoint.tensors[name].shape) for name in streamed.rest_tensors
        ),
        total_bytes=checkpoint.nbytes(),
        side_bytes=_side_bytes(checkpoint),
        prunable=tuple(_numel(block) for block in weights),
        slots=tuple(slot.stored(streamed.block(largest)).numel() for slot in slots),
        squared_inputs=sum(
            one.in_features**2 for one in _with_inputs_of_their_own(weights[largest])
        ),
        columns=sum(weight.in_features for weight in weights[largest]),
        active_fraction=fraction,
        largest_matrix=max(weight.numel for weight in every),
        widest_input=max(weight.in_features for weight in every),
        feature_widths=int(sum(weight.out_features for weight in weights[largest]) * fraction),
        hidden_size=streamed.config.hidden_size,
        heads=getattr(streamed.config, "num_attention_heads", 1),
        attention_matrices=streamed.attention_matrices,
        vocab_size=streamed.config.vocab_size,
    )


def work_of(
    opened: OpenModel,
    weights: Sequence[list[PrunableWeight]],
    schedule: Schedule,
    method: Method | None,
    resources: Resources,
    *,
    nsamples: int,
    seqlen: int,
    activations: Sequence[type[ActivationStatistic]] = (),
) -> Workload:
    """Return what is to be done; without a method nothing is pruned."""
    streamed = opened.streamed
    on_gpu = streamed.device.type == "cuda"
    dtypes = {entry.dtype for entry in opened.checkpoint.tensors.values()}
    converted = any(
        weight.slot.expert is not None and weight.disk_index is None
        for block in weights
        for weight in block
    )
    return Workload(
        schedule=schedule,
        activations=_activation_cost(weights, activations),
        deciding=DecisionCost() if method is None else _decision_cost(method),
        nsamples=nsamples,
        seqlen=seqlen,
        itemsize=streamed.dtype.itemsize,
        on_gpu=on_gpu,
        shares_memory=not (on_gpu or converted) and dtypes == {streamed.dtype},
        resident_bits=_RESIDENT_BITS[resources.compute_weights],
        logits_chunk=HEAD_LOGITS,
        tile=TILE[streamed.device.type],
        slab=AT_ONCE[streamed.device.type],
        writes=method is not None,
    )


def budget_of(resources: Resources, device: torch.device, folders: Collection[Path]) -> Budget:
    """Return what a run that writes to `folders` may take: as asked, else what is free."""
    disks: list[Path] = []
    for folder in folders:
        if not any(machine.same_disk(folder, other) for other in disks):
            disks.append(folder)
    gpu = resources.gpu_memory
    if gpu is None and device.type == "cuda" and torch.cuda.is_available():
        gpu = machine.free_gpu_bytes(device)
    host, disk = resources.cpu_memory, resources.disk
    return Budget(
        host_bytes=machine.free_host_bytes() if host is None else host,
        gpu_bytes=gpu,
        disk_bytes=sum(map(machine.free_disk_bytes, disks)) if disk is None else disk,
    )


def check_disks(plan: Plan, output: Path, work_folder: Path) -> None:
    """Raise `BudgetError` if output and work folder are on two disks and one is too small."""
    if machine.same_disk(output, work_folder):
        return
    # The files of an earlier attempt take space that is no longer free, and are in the plan.
    for what, needed, folder, taken, way_out in (
        ("the output", plan.output_bytes, output, size_on_disk(partial_folder(output)), "OUTPUT"),
        (
            "what is stored between passes",
            plan.spill_bytes,
            work_folder,
            size_on_disk(work_folder),
            "--work-dir",
        ),
    ):
        free = machine.free_disk_bytes(folder) + taken
        if needed > free:
            raise BudgetError(
                f"{what} needs {gibibytes(needed)} of disk space in {folder.parent}, "
                f"{gibibytes(free)} are free: make room, or choose another {way_out}"
            )


def still_needed(plan: Plan, output: Path, work_folder: Path, failed: Path) -> str:
    """Say how much of a plan is not on the disk yet, and how much is free; empty if nothing.

    `failed` is the file that could not be written, which tells the disk if there are two.
    """
    partial = partial_folder(output)
    if machine.same_disk(output, work_folder):
        folder, needed = work_folder, plan.predicted.disk_bytes
        taken = size_on_disk(work_folder) + size_on_disk(partial)
    elif failed.is_relative_to(work_folder):
        folder, needed, taken = work_folder, plan.spill_bytes, size_on_disk(work_folder)
    else:
        folder, needed, taken = partial, plan.output_bytes, size_on_disk(partial)
    if needed <= taken:
        return ""
    free = machine.free_disk_bytes(folder)
    return (
        f"{gibibytes(needed - taken)} more are needed in {folder.parent} and {gibibytes(free)} are "
        f"free"
    )


def machine_speed(
    opened: OpenModel, weights: Sequence[list[PrunableWeight]], seqlen: int, write_to: Path
) -> MachineSpeed | None:
    """Measure this machine and the disk of a folder for two seconds; None if its GPU is away."""
    device = opened.streamed.device
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    shapes = [(one.out_features, one.in_features) for one in max(weights, key=_numel)]
    file = next(iter(opened.checkpoint.tensors.values())).file
    limit = probe_bytes(device)
    try:
        return MachineSpeed(
            flops_s=flops_rate(device, opened.streamed.dtype, shapes, seqlen, limit_bytes=limit),
            memory_bytes_s=memory_rate(device, limit_bytes=limit),
            read_bytes_s=read_rate(file if file.is_file() else None, write_to),
            write_bytes_s=write_rate(write_to),
        )
    finally:
        give_back_freed()


def smaller_work(work: Workload) -> list[tuple[str, Workload]]:
    """Return smaller work that could fit instead, each with the option to type for it."""
    options: list[tuple[str, Workload]] = []
    seqlen = work.seqlen // 2
    while work.schedule.needs_samples and seqlen >= 128:
        options.append((f"--seqlen {seqlen}", replace(work, seqlen=seqlen)))
        seqlen //= 2
    nsamples = work.nsamples // 2
    while work.schedule.needs_samples and nsamples >= 8:
        options.append((f"--nsamples {nsamples}", replace(work, nsamples=nsamples)))
        nsamples //= 2
    if work.on_gpu and work.resident_bits is None:
        options.append(("--compute-weights nf4", replace(work, resident_bits=4)))
    return options


def _side_bytes(checkpoint: Checkpoint) -> int:
    """Return bytes of side files, and a bound per tensor for headers, record and journal."""
    paths = side_files(checkpoint.folder)
    files = sum(path.stat().st_size for path in paths if path.is_file())
    return files + _TOLD_PER_TENSOR * len(checkpoint.tensors)


def _numel(weights: Sequence[PrunableWeight]) -> int:
    return sum(weight.numel for weight in weights)


def _decision_cost(method: Method) -> DecisionCost:
    return DecisionCost(
        bytes_per_weight=method.bytes_per_weight,
        bytes_per_squared_input=method.bytes_per_squared_input,
        flops_per_cubed_input=method.flops_per_cubed_input,
        sweeps_columns=method.sweeps_columns,
    )


def _activation_cost(
    weights: Sequence[list[PrunableWeight]], statistics: Sequence[type[ActivationStatistic]]
) -> ActivationCost:
    """Return what these statistics take in the largest block, as they declare it."""
    block = max(weights, key=_numel)
    own = _with_inputs_of_their_own(block)
    held = [
        (statistic, weight.out_features, weight.in_features)
        for statistic in statistics
        for weight in (own if statistic.shares_inputs else block)
    ]
    return ActivationCost(
        entries=sum(math.prod(statistic.shape(*shape)) for statistic, *shape in held),
        largest_entries=max(
            (
                math.prod(statistic.shape(weight.out_features, weight.in_features))
                for statistic in statistics
                for weights_of_block in weights
                for weight in weights_of_block
            ),
            default=0,
        ),
        flops_per_token=sum(statistic.flops_per_token(*shape) for statistic, *shape in held),
    )


def _with_inputs_of_their_own(weights: Sequence[PrunableWeight]) -> list[PrunableWeight]:
    """Return one matrix of a block for every input; several are multiplied with the same input."""
    found: dict[tuple[str, int | None, bool, int], PrunableWeight] = {}
    for weight in weights:
        path = weight.slot.parameter.removesuffix(".weight")
        owner, _, leaf = path.rpartition(".")
        last = bool(_OUTPUT_PROJECTION.search(leaf))
        found[owner, weight.slot.expert, last, weight.in_features] = weight
    return list(found.values())


def _active_fraction(opened: OpenModel, weights: Sequence[PrunableWeight]) -> float:
    """Return the share of prunable weights that a token uses: below 1 if experts are routed."""
    experts = _first(opened, _EXPERTS)
    per_token = _first(opened, _EXPERTS_PER_TOKEN)
    total = sum(weight.numel for weight in weights)
    routed = sum(weight.numel for weight in weights if "experts" in weight.name)
    if not experts or not per_token:
        return 1.0
    return (total - routed + routed * min(1.0, per_token / experts)) / total


def _first(opened: OpenModel, names: Sequence[str]) -> int | None:
    values = (getattr(opened.streamed.config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
