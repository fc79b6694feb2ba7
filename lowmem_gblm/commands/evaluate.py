"""Perplexity of a model, one decoder block resident at a time."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_gblm.commands.calibration import (
    bos_of_windows,
    evaluation_windows,
    open_source,
    resolve_bos,
)
from lowmem_gblm.commands.estimate import budget_of, limited, work_of
from lowmem_gblm.commands.request import EvalRequest, resolve_seqlen
from lowmem_gblm.errors import JobError, NonFiniteError
from lowmem_gblm.model.block_loader import BlockLoader
from lowmem_gblm.model.open_model import OpenModel, check_tokens, open_model
from lowmem_gblm.model.prunable import prunable_weights
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.planning.plan import Plan
from lowmem_gblm.planning.planner import plan
from lowmem_gblm.planning.schedule import EVALUATION
from lowmem_gblm.planning.steps import Layout, steps
from lowmem_gblm.runtime import machine, memory
from lowmem_gblm.runtime.accelerator import peak_bytes
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.runtime.signals import StopFlag, stop_on_signals
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.disk_errors import explained, is_trouble
from lowmem_gblm.storage.in_place_marker import check_complete
from lowmem_gblm.storage.locking import OwnedFolder, model_lock, owner_of
from lowmem_gblm.sweeps.boundaries import embed
from lowmem_gblm.sweeps.context import SweepContext
from lowmem_gblm.sweeps.dense import dense_sweep, losses
from lowmem_gblm.sweeps.offload import Offload, open_store
from lowmem_gblm.sweeps.sample_set import SampleSet

_ON_DISK = Path("/var/tmp")
_PREFIX = "lowmem-gblm-"
_OWNER = "eval"


def evaluate(request: EvalRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Measure perplexity: `exp` of the mean over windows of the mean next-token cross-entropy.

    The text is tokenized once and cut into windows of `seqlen` that do not overlap; the tail is
    dropped. The window is part of the number: perplexities of different windows do not compare.
    """
    memory.reset_host_peak()
    memory.settle_allocator()
    opened = open_model(request.model, request)
    with model_lock(opened.checkpoint.folder, alone=False):
        check_complete(opened.checkpoint.folder)
        return _evaluated(request, opened, listener)


def _evaluated(
    request: EvalRequest, opened: OpenModel, listener: Listener | None
) -> dict[str, Any]:
    """Return the result, while the model is locked."""
    checkpoint, streamed = opened.checkpoint, opened.streamed
    job = _pruned_by(checkpoint.folder)
    seqlen = resolve_seqlen(request.seqlen, opened.positions)
    memory.settle_allocator(opened.boundary_bytes(seqlen))
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=request.trust_remote_code)
    samples_NT = evaluation_windows(
        open_source(request.evaluation_text, "evaluation", request.text_column),
        tokenizer,
        seqlen=seqlen,
        windows=request.windows,
        bos=bos_of_windows(request.bos, opened.model_type, tokenizer.bos),
    )
    check_tokens(opened, samples_NT)
    count = len(samples_NT)
    stop = StopFlag()
    progress = Progress(
        [
            Stage(name="embed", steps=count, cost=0),
            Stage(name="dense", steps=streamed.depth, cost=1),
            Stage(name="head", steps=count, cost=1 / streamed.depth),
        ],
        listener,
        stop,
    )
    folder = _work_folder(request)
    _remove_left_behind(folder)
    weights = prunable_weights(checkpoint, streamed)
    work = work_of(opened, weights, EVALUATION, request, nsamples=count, seqlen=seqlen)
    budget = budget_of(request, streamed.device, [folder])
    planned = plan(work, budget)
    with (
        stop_on_signals(stop),
        _told_of_its_disk(planned, folder),
        limited(budget, planned, streamed.device, stop),
        _folder(folder) as own,
    ):
        found = _losses(opened, request, planned, samples_NT, own, progress)
    mean = sum(found) / count
    if not math.isfinite(mean):
        first = next(n for n, loss in enumerate(found) if not math.isfinite(loss))
        raise NonFiniteError(
            f"window {first} of {request.evaluation_text} has the loss {found[first]}"
        )
    return {
        "model": request.model,
        "job": job,
        "text": request.evaluation_text,
        "seqlen": seqlen,
        "windows": count,
        "bos": resolve_bos(request.bos, opened.model_type),
        "perplexity": math.exp(mean),
        "seconds": {**progress.seconds, "total": progress.total_seconds()},
        "memory": {
            "host_peak_bytes": memory.host_peak_bytes(),
            "gpu_peak_bytes": peak_bytes(streamed.device),
        },
    }


def _pruned_by(folder: Path) -> str | None:
    """Return the job that has pruned a model, by which `report` knows the output; None if dense."""
    record = folder / RECORD
    return read_json(record).get("job") if record.is_file() else None


def _losses(
    opened: OpenModel,
    request: EvalRequest,
    planned: Plan,
    samples_NT: Tensor,
    folder: Path,
    progress: Progress,
) -> list[float]:
    checkpoint, streamed, choices = opened.checkpoint, opened.streamed, planned.choices
    weights = prunable_weights(checkpoint, streamed) if request.resident_kind else None
    with (
        open_store(folder, planned.host_spill_bytes) as store,
        Offload(store, streamed.device, progress, choices.behind_bytes) as offload,
    ):
        run = SweepContext(
            model=streamed,
            checkpoint=checkpoint,
            tokens_NT=samples_NT,
            samples=SampleSet(len(samples_NT), tolerated=0, what="window"),
            table=steps(EVALUATION, Layout(depth=streamed.depth)),
            loader=BlockLoader(
                checkpoint, streamed, progress, weights, choices, request.resident_kind
            ),
            offload=offload,
            progress=progress,
        )
        embed(run)
        dense_sweep(run)
        return losses(run)


def _work_folder(request: EvalRequest) -> Path:
    """Return where boundaries are stored; by default /var/tmp, as /tmp is often in memory."""
    if request.work_dir is not None:
        return request.work_dir
    return _ON_DISK if os.access(_ON_DISK, os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def _told_of_its_disk(planned: Plan, folder: Path) -> Iterator[None]:
    """Run the body; a disk that is full or failing becomes a sentence."""
    try:
        yield
    except OSError as error:
        if not is_trouble(error):
            raise
        free = gibibytes(machine.free_disk_bytes(folder))
        needs = f"{gibibytes(planned.spill_bytes)} are needed in {folder} and {free} are free"
        what_to_do = "give the same command again, or give another --work-dir"
        raise explained(error, needs, what_to_do) from error


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """Run the body with a new folder, which is removed afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    own = OwnedFolder(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)), _OWNER)
    try:
        yield own.path
    finally:
        own.remove()


def _remove_left_behind(parent: Path) -> None:
    """Remove folders of this user whose process was killed: they may hold gigabytes."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # Jobs may have folders of like names, and a folder may be about to be marked: both stay.
        with suppress(OSError, JobError):
            if folder.lstat().st_uid == os.getuid() and owner_of(folder) == _OWNER:
                OwnedFolder(folder, _OWNER).remove()
