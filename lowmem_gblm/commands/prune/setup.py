"""The setup of a run: plain values, computed in the order of the functions below.

Nothing is drawn, hashed or downloaded later. A request that does not fit the model raises a
RequestError, text or a tokenizer that cannot be used a RequestError or CheckpointError, and a plan
that does not fit the budget a BudgetError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.commands.calibration import calibration_samples, open_source
from lowmem_gblm.commands.estimate import budget_of, check_disks, sizes_of, smaller_work, work_of
from lowmem_gblm.commands.paths import Paths
from lowmem_gblm.commands.prune.identity import (
    block_fingerprints,
    computing_versions,
    fingerprints,
    identity,
    text_name,
)
from lowmem_gblm.commands.request import PruneRequest, resolve_seqlen, to_json
from lowmem_gblm.methods import Method, find_method
from lowmem_gblm.methods.masks import NofM
from lowmem_gblm.model.open_model import OpenModel, check_tokens
from lowmem_gblm.model.prunable import PrunableWeight, prunable_weights
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.planning import Budget, Choices, MachineSpeed, ModelSizes, Plan, Workload, plan
from lowmem_gblm.planning.schedule import Activations, Schedule, schedule
from lowmem_gblm.planning.steps import Step, step_table
from lowmem_gblm.runtime import memory
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.disk_errors import explained_at
from lowmem_gblm.storage.in_place import check_overwritable, overwritten_blocks
from lowmem_gblm.storage.job_state import check_same_job
from lowmem_gblm.storage.locking import size_on_disk
from lowmem_gblm.sweeps.statistics import NeededStatistics, needed_statistics
from lowmem_gblm.sweeps.statistics.gradient import loss_scale


@dataclass(frozen=True, kw_only=True)
class PruneScope:
    """The part of a setup that follows from the request and from headers alone.

    Attributes:
        weights: The matrices to prune, of every block.
        seqlen: Tokens per sample.
        base_bytes: Resident memory of the process before any weight is loaded.
    """

    request: PruneRequest
    model: OpenModel
    weights: Sequence[list[PrunableWeight]]
    method: Method
    statistics: NeededStatistics
    schedule: Schedule
    seqlen: int
    base_bytes: int

    @property
    def pruned_names(self) -> list[list[str]]:
        """Return the names on disk of what is pruned in every block."""
        return [list(dict.fromkeys(weight.name for weight in block)) for block in self.weights]

    @property
    def loss_scale(self) -> float:
        """Return the factor of the loss on its way back."""
        return loss_scale(self.model.streamed.dtype, self.seqlen)

    @cached_property
    def sizes(self) -> ModelSizes:
        """Return the sizes that memory and work follow from."""
        return sizes_of(self.model, self.weights)

    @cached_property
    def work(self) -> Workload:
        """Return what is to be done."""
        found = work_of(
            self.model,
            self.weights,
            self.schedule,
            self.method,
            self.request,
            nsamples=self.request.nsamples,
            seqlen=self.seqlen,
            activations=self.statistics.activations,
        )
        return replace(found, writes=False, rewrites=True) if self.request.in_place else found


@dataclass(frozen=True, kw_only=True)
class PruneSetup:
    """Everything that is known before the first step of a run.

    Attributes:
        tokens_NT: Calibration samples, int64 [N, T]; [0, T] for a method that needs none.
        fingerprints: Hashes of the model and the samples.
        identity: What, if it were different, would give another result.
        previous: The description of the job that is resumed, or None.
    """

    scope: PruneScope
    paths: Paths
    tokens_NT: Tensor
    budget: Budget
    plan: Plan
    table: tuple[Step, ...]
    fingerprints: Mapping[str, str]
    identity: Mapping[str, Any]
    previous: Mapping[str, Any] | None

    def description(self) -> dict[str, Any]:
        """Return what identifies the job, how to ask for it again, and what was chosen."""
        return {
            "identity": self.identity,
            "folder": str(self.paths.work_folder.resolve()),
            "output": str(self.paths.output.resolve()),
            "request": to_json(self.scope.request),
            "choices": asdict(self.plan.choices),
        }


def prune_scope(request: PruneRequest, model: OpenModel) -> PruneScope:
    """Return what is pruned, and how; no weight is loaded."""
    weights = prunable_weights(model.checkpoint, model.streamed, request.include, request.exclude)
    if request.in_place and Path(request.model).is_dir() and model.checkpoint.on_disk:
        names = [weight.name for block in weights for weight in block]
        check_overwritable(model.checkpoint, names, shared=request.in_place_shared)
    if isinstance(request.target, NofM):
        for weight in (weight for block in weights for weight in block):
            request.target.check_width(weight.name, weight.in_features)
    method = find_method(request.method)
    statistics = needed_statistics(method.needs_with(request.options))
    activations: Activations = "dense" if request.activations == "dense" else "pruned"
    return PruneScope(
        request=request,
        model=model,
        weights=weights,
        method=method,
        statistics=statistics,
        schedule=schedule(
            activations,
            needs_backward=statistics.gradient is not None,
            needs_forward=bool(statistics.activations),
            in_place=request.in_place,
        ),
        seqlen=resolve_seqlen(request.seqlen, model.positions),
        base_bytes=memory.host_resident_bytes(),
    )


def draw_samples(scope: PruneScope) -> Tensor:
    """Return calibration samples, int64 [N, T]; [0, T] for a method that needs none."""
    if not scope.schedule.needs_samples:
        return torch.empty(0, scope.seqlen, dtype=torch.int64)
    request, folder = scope.request, scope.model.checkpoint.folder
    drawn = calibration_samples(
        open_source(request.calibration_text, "calibration", request.text_column),
        load_tokenizer(folder, trust_remote_code=request.trust_remote_code),
        nsamples=request.nsamples,
        seqlen=scope.seqlen,
        seed=request.seed,
    )
    check_tokens(scope.model, drawn)
    return drawn


def prepare(
    scope: PruneScope, paths: Paths, tokens_NT: Tensor, previous: Mapping[str, Any] | None
) -> PruneSetup:
    """Return the setup of a run; a `JobError` names every difference to the job that is there."""
    with explained_at(paths.work_folder, kept=previous is not None):
        prints = fingerprints_of(scope, tokens_NT)
        found = identity_of(scope, paths, prints, previous)
    kept = None
    if previous is not None:
        check_same_job(paths.work_folder, previous["identity"], found)
        kept = Choices(**previous["choices"])
    budget = budget_for(scope, paths, resumes=previous is not None)
    planned = plan_of(scope, budget, kept=kept)
    check_disks(planned, paths.output, paths.work_folder)
    return PruneSetup(
        scope=scope,
        paths=paths,
        tokens_NT=tokens_NT,
        budget=budget,
        plan=planned,
        table=step_table(scope.sizes, scope.work, planned.choices),
        fingerprints=prints,
        identity=found,
        previous=previous,
    )


def plan_of(
    scope: PruneScope,
    budget: Budget,
    *,
    kept: Choices | None = None,
    speed: MachineSpeed | None = None,
) -> Plan:
    """Return how the work is done and what it will take.

    Without `speed` there is no time in the plan. `kept` are the choices of a resumed job.
    """
    return plan(
        scope.sizes,
        scope.work,
        scope.base_bytes,
        budget,
        speed=speed,
        alternatives=smaller_work(scope.work),
        kept=kept,
    )


def budget_for(scope: PruneScope, paths: Paths, *, resumes: bool) -> Budget:
    """Return what a run may use; what an earlier attempt has written counts as free."""
    request = scope.request
    found = budget_of(request, scope.model.streamed.device, paths.written)
    if not resumes or request.disk is not None or found.disk_bytes is None:
        return found
    taken = size_on_disk(paths.work_folder)
    if not request.in_place:
        taken += size_on_disk(paths.partial)
    return replace(found, disk_bytes=found.disk_bytes + taken)


def fingerprints_of(scope: PruneScope, tokens_NT: Tensor) -> dict[str, str]:
    """Return the fingerprints of the model and of the samples."""
    request = scope.request
    return fingerprints(
        scope.model.checkpoint,
        tokens_NT,
        overwritten=scope.pruned_names if request.in_place else (),
        trust_remote_code=request.trust_remote_code,
    )


def identity_of(
    scope: PruneScope, paths: Paths, prints: Mapping[str, str], previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what, if it were different, would give another result.

    Args:
        prints: Fingerprints of the model and of the samples.
        previous: The description of the job that is resumed, or None.
    """
    request, checkpoint = scope.request, scope.model.checkpoint
    asked = identity(request, scope.model, scope.seqlen)
    # Files are known by what is in them, wherever they lie.
    asked["calibration"] = text_name(request)
    asked |= prints
    asked |= computing_versions()
    # Headers do not tell whether the model was pruned in place in the meantime.
    asked["source_pruned"] = (checkpoint.folder / RECORD).exists()
    if request.in_place:
        asked["source_blocks"] = _blocks_seen(scope, paths, previous)
    if previous is not None and request.accept_other_rounding:
        asked["device"] = previous["identity"].get("device")
    return asked


def _blocks_seen(scope: PruneScope, paths: Paths, previous: Mapping[str, Any] | None) -> list[str]:
    """Return what tells the blocks from others; of overwritten blocks, as they were before."""
    seen = block_fingerprints(scope.model.checkpoint, scope.pruned_names)
    if previous is not None:
        former = previous["identity"]["source_blocks"]
        for index in overwritten_blocks(paths.work_folder):
            seen[index] = former[index]
    return seen
