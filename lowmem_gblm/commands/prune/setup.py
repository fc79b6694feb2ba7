"""What a run is made of: the opened model, its prunable weights, the samples and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.commands.calibration import calibration_samples, open_source
from lowmem_gblm.commands.estimate import budget_of, check_disks, sizes_of, smaller_work, work_of
from lowmem_gblm.commands.prune.identity import (
    blocks_seen,
    computing_versions,
    fingerprints,
    identity,
    text_name,
)
from lowmem_gblm.commands.request import (
    EvalRequest,
    PruneRequest,
    output_folder,
    resolve_seqlen,
    to_json,
    work_folder,
)
from lowmem_gblm.methods import Method, find_method
from lowmem_gblm.methods.masks import NofM
from lowmem_gblm.model.open_model import OpenModel, check_tokens, open_model
from lowmem_gblm.model.prunable import PrunableWeight, prunable_weights
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.planning import Budget, Choices, Plan, Speeds, Workload, plan
from lowmem_gblm.planning.schedule import Activations, Schedule, schedule
from lowmem_gblm.runtime import memory
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.writer import partial_folder
from lowmem_gblm.storage.in_place import check_overwritable, overwritten_blocks
from lowmem_gblm.storage.in_place_marker import check_whole
from lowmem_gblm.storage.job import check_same_job, has_steps, is_overwriting, read_description
from lowmem_gblm.storage.locking import size_on_disk
from lowmem_gblm.sweeps.statistics.gradient import GradientNorm, loss_scale


@dataclass(frozen=True)
class PruneSetup:
    """Everything that a prune run needs and that is known before its first pass.

    Attributes:
        request: What was asked.
        opened: The model.
        weights: What will be pruned in every block.
        base_bytes: Resident memory of the process before any weight is loaded.
        resumes: Whether what an earlier attempt has begun is gone on with.
    """

    request: PruneRequest
    opened: OpenModel
    weights: Sequence[list[PrunableWeight]]
    base_bytes: int
    resumes: bool = True

    @cached_property
    def method(self) -> Method:
        """How weights are ranked."""
        return find_method(self.request.method)

    @cached_property
    def schedule(self) -> Schedule:
        """Which passes run."""
        dense = self.request.activations == "dense"
        activations: Activations = "dense" if dense else "pruned"
        return schedule(self.method.needs, activations, in_place=self.request.in_place)

    @property
    def gradient_norm(self) -> GradientNorm:
        """How gradients add up over samples."""
        return "l2" if self.request.gradient_norm == "l2" else "l1"

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with on its way back."""
        return loss_scale(self.opened.streamed.dtype, self.seqlen)

    @cached_property
    def seqlen(self) -> int:
        """Tokens per sample."""
        return resolve_seqlen(self.request.seqlen, self.opened.positions)

    @cached_property
    def samples(self) -> Tensor:
        """Calibration samples, int64 [N, T]; [0, T] for a method that needs none.

        Raises:
            CheckpointError: The tokenizer knows more tokens than the model.
        """
        if not self.schedule.needs_samples:
            return torch.empty(0, self.seqlen, dtype=torch.int64)
        drawn = calibration_samples(
            open_source(self.request.calibration_text, "calibration", self.request.text_column),
            load_tokenizer(
                self.opened.checkpoint.folder, trust_remote_code=self.request.trust_remote_code
            ),
            nsamples=self.request.nsamples,
            seqlen=self.seqlen,
            seed=self.request.seed,
        )
        check_tokens(self.opened, drawn)
        return drawn

    @cached_property
    def work(self) -> Workload:
        """What is to be done."""
        found = work_of(
            self.opened,
            self.weights,
            self.schedule,
            self.method,
            self.request,
            nsamples=self.request.nsamples,
            seqlen=self.seqlen,
        )
        return replace(found, writes=False, rewrites=True) if self.request.in_place else found

    @cached_property
    def plan(self) -> Plan:
        """How it is done and what it will take.

        Raises:
            BudgetError: It does not fit.
        """
        return self.planned(None)

    def planned(self, speeds: Speeds | None) -> Plan:
        """The same; with the speeds of the machine also how long it takes."""
        kept = None
        if self.previous is not None:
            check_same_job(self.work_folder, self.previous["identity"], self.identity)
            kept = Choices(**self.previous["choices"])
        made = plan(
            sizes_of(self.opened, self.weights),
            self.work,
            self.base_bytes,
            self.budget,
            speeds=speeds,
            alternatives=smaller_work(self.work),
            kept=kept,
        )
        check_disks(made, self.output, self.work_folder)
        return made

    @cached_property
    def budget(self) -> Budget:
        """What it may take."""
        folders = [self.work_folder, *([] if self.request.in_place else [self.output])]
        found = budget_of(self.request, self.opened.streamed.device, folders)
        if self.previous is None or self.request.disk is not None or found.disk_bytes is None:
            return found
        # What an earlier attempt has written is no longer free, and counts in the plan.
        taken = size_on_disk(self.work_folder)
        if not self.request.in_place:
            taken += size_on_disk(partial_folder(self.output))
        return replace(found, disk_bytes=found.disk_bytes + taken)

    @property
    def output(self) -> Path:
        """Where the pruned model will be."""
        return output_folder(self.request)

    @property
    def work_folder(self) -> Path:
        """Where boundaries and gradients wait: as asked, else beside the output."""
        return work_folder(self.request)

    @cached_property
    def previous(self) -> dict[str, Any] | None:
        """What an earlier attempt at this job has described; None if it has done nothing yet."""
        goes_on = self.resumes and has_steps(self.work_folder)
        return read_description(self.work_folder) if goes_on else None

    @property
    def pruned_names(self) -> list[list[str]]:
        """Names on disk of what is pruned in every block."""
        return [list(dict.fromkeys(weight.name for weight in block)) for block in self.weights]

    def check_whole(self) -> None:
        """Raise `JobError` if the model is being pruned in place by another job."""
        if not (self.request.in_place and is_overwriting(self.output, self.work_folder)):
            check_whole(self.opened.checkpoint.folder)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the model and the samples."""
        checkpoint, request = self.opened.checkpoint, self.request
        return fingerprints(
            checkpoint,
            self.samples,
            overwritten=self.pruned_names if request.in_place else (),
            trust_remote_code=request.trust_remote_code,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What gives another result if it is another."""
        asked = identity(self.request, self.opened, self.seqlen)
        # Files are known by what is in them, wherever they lie.
        asked["calibration"] = text_name(self.request)
        asked |= self.fingerprints
        asked |= computing_versions()
        # Headers do not tell whether the model was pruned in place in the meantime.
        asked["source_pruned"] = (self.opened.checkpoint.folder / RECORD).exists()
        if self.request.in_place:
            asked["source_blocks"] = self._blocks_seen()
        if self.previous is not None and self.request.accept_other_rounding:
            asked["device"] = self.previous["identity"].get("device")
        return asked

    def _blocks_seen(self) -> list[str]:
        """What tells the blocks from others; of those that are overwritten, as they were before."""
        seen = blocks_seen(self.opened.checkpoint, self.pruned_names)
        if self.previous is not None:
            former = self.previous["identity"]["source_blocks"]
            for index in overwritten_blocks(self.work_folder):
                seen[index] = former[index]
        return seen

    def description(self) -> dict[str, Any]:
        """What identifies the job, how to ask for it again, and what was chosen."""
        return {
            "identity": self.identity,
            "folder": str(self.work_folder.resolve()),
            "output": str(self.output.resolve()),
            "request": to_json(self.request),
            "choices": asdict(self.plan.choices),
        }


def open_setup(request: PruneRequest, *, to_plan: bool = False) -> PruneSetup:
    """Open the model and check what can be checked without loading a weight.

    Args:
        to_plan: The weights need not be there, nor the device.

    Raises:
        CheckpointError: The model cannot be used.
        RequestError: The request does not fit the model.
        JobError: The model is being pruned in place by another job.
    """
    goes_on = request.in_place and not to_plan
    goes_on = goes_on and is_overwriting(output_folder(request), work_folder(request))
    opened = open_model(request.model, request, to_plan=to_plan, unfinished=goes_on)
    weights = prunable_weights(opened.checkpoint, opened.streamed, request.include, request.exclude)
    if request.in_place and Path(request.model).is_dir() and opened.checkpoint.on_disk:
        names = [weight.name for block in weights for weight in block]
        check_overwritable(opened.checkpoint, names, shared=request.in_place_shared)
    if isinstance(request.target, NofM):
        for weight in (weight for block in weights for weight in block):
            request.target.check_width(weight.name, weight.in_features)
    resident_bytes = memory.host_resident_bytes()
    return PruneSetup(request, opened, weights, resident_bytes, resumes=not to_plan)


def plan_evaluation(
    opened: OpenModel, request: EvalRequest, folder: Path, *, nsamples: int, seqlen: int
) -> Plan:
    """What an evaluation will take.

    Args:
        folder: Where hidden states wait.

    Raises:
        BudgetError: It does not fit what may be used.
    """
    weights = prunable_weights(opened.checkpoint, opened.streamed)
    forward_only = Schedule(passes=("embed", "dense", "head"), prune_in="prune", prune_forwards=0)
    work = work_of(opened, weights, forward_only, None, request, nsamples=nsamples, seqlen=seqlen)
    return plan(
        sizes_of(opened, weights),
        work,
        memory.host_resident_bytes(),
        budget_of(request, opened.streamed.device, [folder]),
        alternatives=[
            (option.replace("--nsamples", "--windows"), other)
            for option, other in smaller_work(work)
        ],
    )
