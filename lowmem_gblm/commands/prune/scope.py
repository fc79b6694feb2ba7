"""What a run prunes, and how: plain values that follow from the request and from headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_gblm.commands.calibration import bos_of_windows, calibration_samples, open_source
from lowmem_gblm.commands.estimate import work_of
from lowmem_gblm.commands.request import PruneRequest, resolve_seqlen
from lowmem_gblm.methods import Method, find_method
from lowmem_gblm.methods.masks import NofM
from lowmem_gblm.model.open_model import OpenModel, check_tokens
from lowmem_gblm.model.prunable import PrunableWeight, prunable_weights
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.planning.schedule import schedule
from lowmem_gblm.planning.sizes import Workload
from lowmem_gblm.storage.in_place import check_overwritable
from lowmem_gblm.sweeps.statistics import NeededStatistics, needed_statistics
from lowmem_gblm.sweeps.statistics.gradient import loss_scale


@dataclass(frozen=True)
class PruneScope:
    """What is pruned, and how; `weights` are the matrices to prune, of every block."""

    request: PruneRequest
    model: OpenModel
    weights: Sequence[list[PrunableWeight]]
    method: Method
    statistics: NeededStatistics
    work: Workload

    @property
    def pruned_names(self) -> list[list[str]]:
        """Return the names on disk of what is pruned in every block."""
        return [list(dict.fromkeys(weight.name for weight in block)) for block in self.weights]

    @property
    def loss_scale(self) -> float:
        """Return the factor of the loss on its way back."""
        return loss_scale(self.model.streamed.dtype, self.work.seqlen)


def prune_scope(request: PruneRequest, model: OpenModel) -> PruneScope:
    """Return what is pruned, and how; no weight is loaded."""
    weights = prunable_weights(model.checkpoint, model.streamed, request.include, request.exclude)
    every = [weight for block in weights for weight in block]
    if request.in_place and Path(request.model).is_dir() and model.checkpoint.on_disk:
        names = [weight.name for weight in every]
        check_overwritable(model.checkpoint, names, shared=request.in_place_shared)
    if isinstance(request.target, NofM):
        for weight in every:
            request.target.check_width(weight.name, weight.in_features)
    method = find_method(request.method)
    statistics = needed_statistics(method.needs_with(request.options))
    stages = schedule(
        "dense" if request.activations == "dense" else "pruned",
        needs_backward=statistics.gradient is not None,
        needs_forward=bool(statistics.activations),
        in_place=request.in_place,
    )
    work = work_of(
        model,
        weights,
        stages,
        request,
        nsamples=request.nsamples,
        seqlen=resolve_seqlen(request.seqlen, model.positions),
        method=method,
        activations=statistics.activations,
        in_place=request.in_place,
    )
    return PruneScope(request, model, weights, method, statistics, work)


def draw_samples(scope: PruneScope) -> Tensor:
    """Return calibration samples, int64 [N, T]; [0, T] for a method that needs none."""
    if not scope.work.schedule.needs_samples:
        return torch.empty(0, scope.work.seqlen, dtype=torch.int64)
    request, folder = scope.request, scope.model.checkpoint.folder
    tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
    drawn = calibration_samples(
        open_source(request.calibration_text, "calibration", request.text_column),
        tokenizer,
        nsamples=request.nsamples,
        seqlen=scope.work.seqlen,
        seed=request.seed,
        bos=bos_of_windows(request.bos, scope.model.model_type, tokenizer.bos),
    )
    check_tokens(scope.model, drawn)
    return drawn
