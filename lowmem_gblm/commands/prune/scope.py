"""What a run prunes, and how: plain values that follow from the request and from headers alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowmem_gblm.commands.calibration import Samples, bos_of_windows, calibration_samples
from lowmem_gblm.commands.estimate import work_of
from lowmem_gblm.commands.held_out import held_out_windows
from lowmem_gblm.commands.method_options import candidates_for
from lowmem_gblm.commands.prune.reuse import (
    asks_other_text,
    check_saves,
    taken_names,
    with_its_samples,
)
from lowmem_gblm.commands.prune.selection import patterns_of
from lowmem_gblm.commands.request import PruneRequest, resolve_seqlen
from lowmem_gblm.commands.texts import InMemory, calibration_text_bytes, open_source
from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import Method, find_method
from lowmem_gblm.methods.masks import Pattern
from lowmem_gblm.model.open_model import OpenModel, check_tokens
from lowmem_gblm.model.prunable import PrunableWeight, prunable_weights
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.planning.schedule import schedule
from lowmem_gblm.planning.sizes import FLOAT32_BYTES, GradientPrecision, Workload
from lowmem_gblm.runtime.memory import give_back_freed
from lowmem_gblm.storage.in_place import check_overwritable
from lowmem_gblm.storage.statistics_folder import StatisticsFolder, TensorLayout
from lowmem_gblm.sweeps.saved_statistics import saved_layout
from lowmem_gblm.sweeps.statistics import NeededStatistics, needed_statistics
from lowmem_gblm.sweeps.statistics.gradient import loss_scale


@dataclass(frozen=True, kw_only=True)
class PruneScope:
    """What is pruned, and how.

    Attributes:
        request: As asked, with the calibration samples of the statistics that are taken.
        weights: The matrices to prune, of every block.
        patterns: What each of their tensors is pruned to, by its name on disk.
        candidates: The options of the method to choose among; empty where nothing is "auto".
        statistics, taken: What the method needs: what is measured, and what an earlier run has
            `saved`.
    """

    request: PruneRequest
    model: OpenModel
    weights: Sequence[list[PrunableWeight]]
    patterns: Mapping[str, Pattern]
    method: Method
    candidates: Sequence[Any]
    statistics: NeededStatistics
    taken: NeededStatistics
    saved: StatisticsFolder | None
    work: Workload

    @property
    def pruned_names(self) -> list[list[str]]:
        """Return the names on disk of what is pruned in every block."""
        return [list(dict.fromkeys(weight.name for weight in block)) for block in self.weights]

    def split(self, drawn_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the calibration samples and the held-out windows of what was drawn."""
        nsamples = len(drawn_NT) - self.work.held_out
        return drawn_NT[:nsamples], drawn_NT[nsamples:]

    @property
    def loss_scale(self) -> float:
        """Return the factor of the loss on its way back."""
        return loss_scale(self.model.streamed.dtype, self.work.seqlen)

    @property
    def magnitude_precision(self) -> GradientPrecision:
        """Return the precision in which gradient magnitudes are saved, or were."""
        asked = self.request.statistics_dtype
        found = asked if self.saved is None else self.saved.manifest["precision"]
        return cast(GradientPrecision, found)

    @property
    def files(self) -> list[TensorLayout]:
        """Return what the files of statistics hold of every block: saved ones, or taken ones."""
        saves = self.request.save_statistics is not None
        kinds = self.statistics.classes if saves else self.taken.classes
        return [saved_layout(block, kinds, self.magnitude_precision) for block in self.weights]


def prune_scope(request: PruneRequest, model: OpenModel) -> PruneScope:
    """Return what is pruned, and how; no weight is loaded."""
    saved = None if request.statistics is None else StatisticsFolder(request.statistics)
    if saved is not None:
        request = with_its_samples(request, saved)
    prunable = prunable_weights(model.checkpoint, model.streamed)
    patterns = patterns_of(request, prunable, model.checkpoint.tensors)
    weights = [[weight for weight in block if weight.name in patterns] for block in prunable]
    if request.in_place and Path(request.model).is_dir() and model.checkpoint.on_disk:
        check_overwritable(model.checkpoint, list(patterns), shared=request.in_place_shared)
    method = find_method(request.method)
    needs = method.needs_with(request.options)
    check_saves(request, needed_statistics(needs))
    taken = taken_names(request, needed_statistics(needs), saved)
    statistics = needed_statistics(name for name in needs if name not in taken)
    seqlen = resolve_seqlen(request.seqlen, model.positions)
    candidates = candidates_for(method, request.options, request.nsamples, seqlen)
    stages = schedule(
        "dense" if request.activations == "dense" else "pruned",
        needs_backward=statistics.gradient is not None,
        needs_forward=bool(statistics.activations),
        in_place=request.in_place,
        searches=bool(candidates),
    )
    work = work_of(
        model,
        weights,
        stages,
        request,
        nsamples=request.nsamples,
        seqlen=seqlen,
        method=method,
        activations=statistics.activations,
        in_place=request.in_place,
        text_bytes=calibration_text_bytes(request.calibration_text) if stages.needs_samples else 0,
    )
    if candidates:
        held_out = held_out_windows(request.nsamples)
        work = replace(work, candidates=len(candidates), held_out=held_out)
    scope = PruneScope(
        request=request,
        model=model,
        weights=weights,
        patterns=patterns,
        method=method,
        candidates=candidates,
        statistics=statistics,
        taken=needed_statistics(taken),
        saved=saved,
        work=work,
    )
    return _with_files(scope)


def _with_files(scope: PruneScope) -> PruneScope:
    """Return the scope, whose work counts the statistics that are saved or taken."""
    files = scope.files
    if not any(files):
        return scope
    sizes = tuple(
        sum(math.prod(shape) * dtype.itemsize for dtype, shape in file.values()) for file in files
    )
    largest = max(math.prod(shape) for file in files for _, shape in file.values())
    saves, takes = (sizes, ()) if scope.saved is None else ((), sizes)
    bytes_of_one = largest * FLOAT32_BYTES
    work = replace(scope.work, saves=saves, takes=takes, statistic_bytes=bytes_of_one)
    return replace(scope, work=work)


def draw_samples(scope: PruneScope) -> Samples:
    """Return calibration samples, then held-out windows; none, [0, T], for a run that needs none.

    A text other than that of saved statistics is drawn from, too: its samples may be others.
    """
    request, given = scope.request, scope.request.calibration
    if not scope.work.schedule.needs_samples and not asks_other_text(request, scope.saved):
        return Samples(torch.empty(0, scope.work.seqlen, dtype=torch.int64))
    if isinstance(given, InMemory) and scope.candidates:
        raise RequestError(
            "what is auto is chosen by windows held out of a text: name a file or a data set as "
            "calibration, or give a value instead of auto"
        )
    if isinstance(given, InMemory) and given.tokens_NT is not None:
        samples = Samples(given.tokens_NT)
    else:
        samples = _drawn(scope, given if isinstance(given, InMemory) else request.calibration_text)
    check_tokens(scope.model, samples.tokens_NT)
    give_back_freed()
    return samples


def _drawn(scope: PruneScope, source: str | InMemory) -> Samples:
    request, folder = scope.request, scope.model.checkpoint.folder
    tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
    return calibration_samples(
        open_source(source, "calibration", request.text_column),
        tokenizer,
        nsamples=request.nsamples,
        seqlen=scope.work.seqlen,
        seed=request.seed,
        bos=bos_of_windows(request.bos, scope.model.model_type, tokenizer.bos),
        packing=request.packing,
        eos=tokenizer.eos,
        held_out=scope.work.held_out,
    )
