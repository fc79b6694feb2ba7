"""From an opened model and a request to a plan: sizes, work, budget, speeds."""

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lowmem_gblm.commands.paths import Paths
from lowmem_gblm.errors import BudgetError
from lowmem_gblm.methods import AT_ONCE, AT_ONCE_ON_GPU, Method
from lowmem_gblm.model.open_model import OpenModel
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.model.streamed_model import HEAD_LOGITS
from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.planning.plan import Budget, Plan
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.planning.run_time import MachineSpeed
from lowmem_gblm.planning.schedule import Schedule
from lowmem_gblm.planning.sizes import ActivationCost, DecisionCost, ModelSizes, Workload
from lowmem_gblm.runtime import benchmark, machine, memory
from lowmem_gblm.runtime.accelerator import (
    context_bytes,
    free_bytes,
    is_accelerator,
    is_here,
    run_on,
)
from lowmem_gblm.runtime.activity import activity
from lowmem_gblm.runtime.signals import StopFlag
from lowmem_gblm.runtime.watchdog import HostWatch
from lowmem_gblm.storage.checkpoint.file_access import side_files
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.locking import size_on_disk
from lowmem_gblm.storage.pending_folder import partial_folder
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from lowmem_gblm.sweeps.statistics.gradient import TILE, TILE_ON_GPU

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_OUTPUT_PROJECTION = re.compile(r"(^|\.)(o|out|down|c|w2|fc2|wo|dense\w*h)(_?proj|_lin)?$|dense$")
_TOLD_PER_TENSOR = 1000
_log = logging.getLogger(__name__)
_RESIDENT_BITS = {"auto": None, "int8": 8, "nf4": 4}


def work_of(
    opened: OpenModel,
    weights: Sequence[list[PrunableWeight]],
    schedule: Schedule,
    resources: Resources,
    *,
    nsamples: int,
    seqlen: int,
    method: Method | None = None,
    activations: Sequence[type[ActivationStatistic]] = (),
    in_place: bool = False,
    text_bytes: int = 0,
    row_length: int | None = None,
    samples_option: str = "--nsamples {}",
) -> Workload:
    """Return what is to be done, before any weight is loaded; without a method, an evaluation."""
    streamed = opened.streamed
    on_gpu = is_accelerator(streamed.device)
    dtypes = {entry.dtype for entry in opened.checkpoint.tensors.values()}
    slots = [(one.slot, one.disk_index) for block in weights for one in block]
    converted = any(slot.expert is not None and index is None for slot, index in slots)
    return Workload(
        sizes=_sizes(opened, weights),
        process_bytes=memory.host_resident_bytes(),
        schedule=schedule,
        activations=_activation_cost(weights, activations),
        deciding=DecisionCost() if method is None else decision_cost(method),
        nsamples=nsamples,
        seqlen=seqlen,
        itemsize=streamed.dtype.itemsize,
        on_gpu=on_gpu,
        shares_memory=not (on_gpu or converted) and dtypes == {streamed.dtype},
        resident_bits=_RESIDENT_BITS[resources.compute_weights],
        logits_chunk=HEAD_LOGITS,
        tile=TILE_ON_GPU if on_gpu else TILE,
        slab=AT_ONCE_ON_GPU if on_gpu else AT_ONCE,
        context_bytes=context_bytes(streamed.device),
        row_length=row_length,
        samples_option=samples_option,
        writes=method is not None and not in_place,
        rewrites=in_place,
        text_bytes=text_bytes,
    )


def _sizes(opened: OpenModel, weights: Sequence[list[PrunableWeight]]) -> ModelSizes:
    """Return the sizes of a model that memory and work follow from."""
    checkpoint, streamed = opened.checkpoint, opened.streamed
    config, tensors = streamed.config, checkpoint.tensors
    every = [weight for block in weights for weight in block]
    fraction = _active_fraction(opened, every)
    largest = max(weights, key=_numel)
    module = streamed.block(weights.index(largest))
    slots = dict.fromkeys(weight.slot for weight in largest)
    return ModelSizes(
        block_bytes=tuple(checkpoint.nbytes(names) for names in streamed.block_tensors),
        rest_bytes=checkpoint.nbytes(streamed.rest_tensors),
        rest_weights=sum(math.prod(tensors[name].shape) for name in streamed.rest_tensors),
        total_bytes=checkpoint.nbytes(),
        side_bytes=_side_bytes(checkpoint),
        prunable=tuple(_numel(block) for block in weights),
        slots=tuple(slot.stored(module).numel() for slot in slots),
        squared_inputs=sum(one.in_features**2 for one in _with_inputs_of_their_own(largest)),
        columns=sum(weight.in_features for weight in largest),
        active_fraction=fraction,
        largest_matrix=max(weight.numel for weight in every),
        widest_input=max(weight.in_features for weight in every),
        feature_widths=int(sum(weight.out_features for weight in largest) * fraction),
        hidden_size=config.hidden_size,
        heads=getattr(config, "num_attention_heads", 1),
        attention_matrices=streamed.attention_matrices,
        vocab_size=config.vocab_size,
    )


def budget_of(resources: Resources, device: torch.device, folders: Collection[Path]) -> Budget:
    """Return what a run that writes to `folders` may take: as asked, else what is free."""
    disks = [disk[0] for disk in _by_disk(folders)]
    gpu = resources.gpu_memory
    if gpu is None and is_accelerator(device) and is_here(device):
        gpu = free_bytes(device)
    host, disk = resources.cpu_memory, resources.disk
    return Budget(
        host_bytes=machine.free_host_bytes() if host is None else host,
        gpu_bytes=gpu,
        disk_bytes=sum(map(machine.free_disk_bytes, disks)) if disk is None else disk,
    )


@contextmanager
def limited(budget: Budget, planned: Plan, device: torch.device, stop: StopFlag) -> Iterator[None]:
    """Run the body on a device, within its budget of GPU memory and of host memory."""
    host_bytes = planned.predicted.host_bytes
    for line in (f"planned: {gibibytes(host_bytes)} of host memory", *planned.reasons):
        _log.debug(line)
    with (
        run_on(device, budget.gpu_bytes),
        HostWatch(budget.host_bytes, stop, planned_bytes=host_bytes),
    ):
        yield


@dataclass(frozen=True)
class _Share:
    """What a folder of a run needs of its disk; `written` is its place until it is complete."""

    what: str
    needed: int
    folder: Path
    written: Path
    option: str


def _shares(plan: Plan, paths: Paths) -> list[list[_Share]]:
    """Return what a run needs of every disk."""
    stored, saved = paths.work_folder, paths.statistics
    what_is_stored = "what is stored between passes"
    shares = [
        _Share("the output", plan.output_bytes, paths.output, paths.partial, "OUTPUT"),
        _Share(what_is_stored, plan.spill_bytes, stored, stored, "--work-dir"),
    ]
    if saved is not None:
        what, size = "what is saved for later runs", plan.statistics_bytes
        shares.append(_Share(what, size, saved, partial_folder(saved), "--save-statistics"))
    by_folder = {share.folder: share for share in shares}
    return [[by_folder[folder] for folder in disk] for disk in _by_disk(by_folder)]


def _by_disk(folders: Iterable[Path]) -> list[list[Path]]:
    """Return the folders, those on one disk together."""
    disks: list[list[Path]] = []
    for folder in folders:
        for disk in disks:
            if machine.same_disk(disk[0], folder):
                disk.append(folder)
                break
        else:
            disks.append([folder])
    return disks


def check_disks(plan: Plan, paths: Paths) -> None:
    """Raise `BudgetError` if a run writes to several disks and one is too small."""
    disks = _shares(plan, paths)
    for disk in disks if len(disks) > 1 else []:
        # The files of an earlier attempt take space that is no longer free, and are in the plan.
        free = machine.free_disk_bytes(disk[0].folder)
        free += sum(size_on_disk(share.written) for share in disk)
        needed = sum(share.needed for share in disk)
        if needed > free:
            what = " and ".join(share.what for share in disk)
            raise BudgetError(
                f"{what} need{'s' * (len(disk) == 1)} {gibibytes(needed)} of disk space in "
                f"{disk[0].folder.parent}, {gibibytes(free)} are free: make room, or choose "
                f"another {' or '.join(share.option for share in disk)}"
            )


def still_needed(plan: Plan, paths: Paths, failed: Path) -> str:
    """Say how much of a plan is not on the disk yet, and how much is free; empty if nothing.

    `failed` is the file that could not be written, which tells the disk if there are two.
    """
    disks = _shares(plan, paths)
    own = (disk for disk in disks if any(failed.is_relative_to(one.written) for one in disk))
    disk = next(own, disks[0])
    written = [share.written for share in disk]
    alone = len(disks) == 1
    needed = plan.predicted.disk_bytes if alone else sum(share.needed for share in disk)
    missing = needed - sum(map(size_on_disk, written))
    if missing <= 0:
        return ""
    free = gibibytes(machine.free_disk_bytes(written[0]))
    return f"{gibibytes(missing)} more are needed in {written[0].parent} and {free} are free"


def machine_speed(
    opened: OpenModel, weights: Sequence[list[PrunableWeight]], seqlen: int, write_to: Path
) -> MachineSpeed | None:
    """Measure this machine and the disk of a folder for two seconds; None if its GPU is away."""
    device, dtype = opened.streamed.device, opened.streamed.dtype
    if not is_here(device):
        return None
    shapes = [(one.out_features, one.in_features) for one in max(weights, key=_numel)]
    file = next(iter(opened.checkpoint.tensors.values())).file
    limit = benchmark.probe_bytes(device)
    try:
        with activity("measuring this machine"):
            return MachineSpeed(
                flops_s=benchmark.flops_rate(device, dtype, shapes, seqlen, limit_bytes=limit),
                memory_bytes_s=benchmark.memory_rate(device, limit_bytes=limit),
                read_bytes_s=benchmark.read_rate(file if file.is_file() else None, write_to),
                write_bytes_s=benchmark.write_rate(write_to),
            )
    finally:
        memory.give_back_freed()


def _side_bytes(checkpoint: Checkpoint) -> int:
    """Return bytes of side files, and a bound per tensor for headers, record and journal."""
    paths = side_files(checkpoint.folder)
    files = sum(path.stat().st_size for path in paths if path.is_file())
    return files + _TOLD_PER_TENSOR * len(checkpoint.tensors)


def _numel(weights: Sequence[PrunableWeight]) -> int:
    return sum(weight.numel for weight in weights)


def decision_cost(method: Method) -> DecisionCost:
    """Return what a decision about one matrix takes, as the method declares it."""
    return DecisionCost(**{one.name: getattr(method, one.name) for one in fields(DecisionCost)})


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
    shapes = {(one.out_features, one.in_features) for every in weights for one in every}
    copied = [one for one in statistics if not one.result_is_sum]
    results = [math.prod(one.shape(*shape)) for one in copied for shape in shapes]
    return ActivationCost(
        entries=sum(math.prod(statistic.shape(*shape)) for statistic, *shape in held),
        largest_entries=max(results, default=0),
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
