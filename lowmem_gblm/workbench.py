"""What a run is made of: the opened model, its prunable weights, the samples and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lowmem_gblm import memory
from lowmem_gblm.calibration import calibration_samples, load_tokenizer, open_source
from lowmem_gblm.disk.checkpoint import Checkpoint
from lowmem_gblm.disk.source import locate
from lowmem_gblm.errors import RequestError
from lowmem_gblm.masks import NofM
from lowmem_gblm.methods import Method, find_method
from lowmem_gblm.model.blocks import PrunableWeight, prunable_weights
from lowmem_gblm.model.skeleton import HEAD_LOGITS, Skeleton
from lowmem_gblm.planning import Budget, ModelSizes, Plan, Work, check_fits, plan
from lowmem_gblm.request import EvalRequest, PruneRequest, Resources, resolve_seqlen
from lowmem_gblm.schedule import Schedule, schedule
from lowmem_gblm.stats.gradient import GradientNorm, loss_scale

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint and the hollow model that fits it."""

    checkpoint: Checkpoint
    skeleton: Skeleton

    def boundary_bytes(self, seqlen: int) -> int:
        """Size of the hidden states of one sample."""
        return seqlen * int(self.skeleton.config.hidden_size) * self.skeleton.dtype.itemsize

    @property
    def positions(self) -> int | None:
        """How many positions the model was made for; None if its configuration does not say."""
        found = getattr(self.skeleton.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None


def open_model(model: str, resources: Resources) -> OpenModel:
    """Read headers and configuration; no weight is loaded.

    Raises:
        CheckpointError: The model cannot be used.
        RequestError: The device is not there.
    """
    checkpoint = Checkpoint(locate(model))
    device = choose_device(resources.device)
    dtype = choose_dtype(resources.dtype, checkpoint, device)
    return OpenModel(checkpoint, Skeleton(checkpoint, device, dtype))


def choose_device(name: str) -> torch.device:
    """The device meant by "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        RequestError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device {name!r}: give auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= count:
        raise RequestError(f"there is no device {name!r} here (CUDA devices: {count})")
    return device


def choose_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """In what to compute: as asked, else in the dtype that most of the checkpoint is in.

    CPUs multiply float16 some hundred times slower than float32, so there it becomes float32.

    Raises:
        RequestError: float16 was asked for on a CPU.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if dtype == torch.float16 and device.type == "cpu":
            raise RequestError("a CPU multiplies float16 too slowly: use --dtype float32")
        return dtype
    totals: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.nbytes
    most = max(totals, key=lambda dtype: totals[dtype], default=torch.float32)
    if most == torch.float16 and device.type == "cpu":
        return torch.float32
    return most if most in (torch.float16, torch.bfloat16) else torch.float32


@dataclass(frozen=True)
class Workbench:
    """Everything that a prune run needs and that is known before its first pass.

    Attributes:
        request: What was asked.
        opened: The model.
        weights: What will be pruned in every block.
        base_bytes: Resident memory of the process before any weight is loaded.
    """

    request: PruneRequest
    opened: OpenModel
    weights: Sequence[list[PrunableWeight]]
    base_bytes: int

    @cached_property
    def method(self) -> Method:
        """How weights are ranked."""
        return find_method(self.request.method)

    @cached_property
    def schedule(self) -> Schedule:
        """Which passes run."""
        dense = self.request.activations == "dense"
        return schedule(self.method.needs, "dense" if dense else "pruned")

    @property
    def gradient_norm(self) -> GradientNorm:
        """How gradients add up over samples."""
        return "l2" if self.request.gradient_norm == "l2" else "l1"

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with on its way back."""
        return loss_scale(self.opened.skeleton.dtype, self.seqlen)

    @cached_property
    def seqlen(self) -> int:
        """Tokens per sample."""
        return resolve_seqlen(self.request.seqlen, self.opened.positions)

    @cached_property
    def samples(self) -> Tensor:
        """Calibration samples, int64 [N, T]; [0, T] for a method that needs none."""
        if not self.schedule.needs_samples:
            return torch.empty(0, self.seqlen, dtype=torch.int64)
        return calibration_samples(
            open_source(self.request.calibration_text, "calibration", self.request.text_column),
            load_tokenizer(self.opened.checkpoint.folder),
            nsamples=self.request.nsamples,
            seqlen=self.seqlen,
            seed=self.request.seed,
        )

    @cached_property
    def plan(self) -> Plan:
        """What it will take."""
        return _plan(
            self.opened,
            self.weights,
            self.schedule,
            self.method.needs,
            nsamples=self.request.nsamples,
            seqlen=self.seqlen,
            base_bytes=self.base_bytes,
            budget=self.budget,
        )

    @property
    def budget(self) -> Budget:
        """What it may take."""
        return budget_of(self.request)


def open_workbench(request: PruneRequest) -> Workbench:
    """Open the model and check what can be checked without loading a weight.

    Raises:
        CheckpointError: The model cannot be used.
        RequestError: The request does not fit the model.
    """
    opened = open_model(request.model, request)
    weights = prunable_weights(opened.checkpoint, opened.skeleton, request.include, request.exclude)
    if isinstance(request.target, NofM):
        for weight in (weight for block in weights for weight in block):
            request.target.check_width(weight.name, weight.in_features)
    return Workbench(request, opened, weights, memory.host_resident_bytes())


def plan_evaluation(opened: OpenModel, request: EvalRequest, *, nsamples: int, seqlen: int) -> Plan:
    """What an evaluation will take.

    Raises:
        BudgetError: It does not fit what may be used.
    """
    made = _plan(
        opened,
        prunable_weights(opened.checkpoint, opened.skeleton),
        Schedule(passes=("embed", "dense", "head"), prune_in="prune", prune_forwards=0),
        (),
        nsamples=nsamples,
        seqlen=seqlen,
        base_bytes=memory.host_resident_bytes(),
        budget=budget_of(request),
    )
    made = replace(made, output_bytes=0)
    check_fits(made, budget_of(request))
    return made


def budget_of(resources: Resources) -> Budget:
    """What a run may take."""
    return Budget(
        host_bytes=resources.cpu_memory,
        gpu_bytes=resources.gpu_memory,
        disk_bytes=resources.disk,
    )


def _plan(
    opened: OpenModel,
    weights: Sequence[list[PrunableWeight]],
    schedule: Schedule,
    needs: Sequence[str],
    *,
    nsamples: int,
    seqlen: int,
    base_bytes: int,
    budget: Budget,
) -> Plan:
    skeleton = opened.skeleton
    on_gpu = skeleton.device.type == "cuda"
    dtypes = {entry.dtype for entry in opened.checkpoint.tensors.values()}
    converted = any(
        weight.slot.expert is not None and weight.disk_index is None
        for block in weights
        for weight in block
    )
    work = Work(
        schedule=schedule,
        needs=tuple(needs),
        nsamples=nsamples,
        seqlen=seqlen,
        itemsize=skeleton.dtype.itemsize,
        on_gpu=on_gpu,
        shares_memory=not (on_gpu or converted) and dtypes == {skeleton.dtype},
        logits_chunk=HEAD_LOGITS,
    )
    return plan(model_sizes(opened, weights), work, base_bytes, budget)


def model_sizes(opened: OpenModel, weights: Sequence[list[PrunableWeight]]) -> ModelSizes:
    """The sizes that memory and work follow from."""
    checkpoint, skeleton = opened.checkpoint, opened.skeleton
    every = [weight for block in weights for weight in block]
    fraction = _active_fraction(skeleton, every)
    outputs = max(sum(weight.out_features for weight in block) for block in weights)
    return ModelSizes(
        block_bytes=tuple(checkpoint.nbytes(names) for names in skeleton.block_tensors),
        rest_bytes=checkpoint.nbytes(skeleton.rest_tensors),
        total_bytes=checkpoint.nbytes(),
        prunable=tuple(sum(weight.numel for weight in block) for block in weights),
        active_fraction=fraction,
        largest_matrix=max(weight.numel for weight in every),
        widest_input=max(weight.in_features for weight in every),
        feature_widths=int(outputs * fraction),
        hidden_size=skeleton.config.hidden_size,
        vocab_size=skeleton.config.vocab_size,
    )


def _active_fraction(skeleton: Skeleton, weights: Sequence[PrunableWeight]) -> float:
    """Share of the prunable weights that a token meets: all of them unless experts are routed."""
    experts = _first(skeleton, _EXPERTS)
    per_token = _first(skeleton, _EXPERTS_PER_TOKEN)
    total = sum(weight.numel for weight in weights)
    routed = sum(weight.numel for weight in weights if "experts" in weight.name)
    if not experts or not per_token:
        return 1.0
    return (total - routed + routed * min(1.0, per_token / experts)) / total


def _first(skeleton: Skeleton, names: Sequence[str]) -> int | None:
    values = (getattr(skeleton.config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def work_folder(request: PruneRequest, output: Path) -> Path:
    """Where boundaries and gradients wait: as asked, else beside the output."""
    return (request.work_dir or output.parent) / (output.name + ".work")
