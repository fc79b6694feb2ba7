"""Perplexity of a model, one decoder block resident at a time."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from lowmem_gblm import memory
from lowmem_gblm.calibration import evaluation_windows, load_tokenizer, open_source
from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.blocks import BlockStream
from lowmem_gblm.progress import Listener, Progress, Stage
from lowmem_gblm.request import EvalRequest, resolve_seqlen
from lowmem_gblm.sweeps.dense import dense_sweep, embed, losses_of
from lowmem_gblm.workbench import open_model, plan_evaluation

_ON_DISK = Path("/var/tmp")


def evaluate(request: EvalRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Measure perplexity: `exp` of the mean over windows of the mean next-token cross-entropy.

    The text is tokenized once and cut into windows of `seqlen` that do not overlap; the tail is
    dropped. The window is part of the number: perplexities of different windows do not compare.

    Returns:
        `model`, `text`, `seqlen`, `windows`, `perplexity`, `seconds`, `memory`.

    Raises:
        NonFiniteError: The perplexity is NaN or infinite.
        LowmemGblmError: See `lowmem_gblm.errors`.
    """
    memory.reset_host_peak()
    memory.settle_allocator()
    opened = open_model(request.model, request)
    memory.reset_gpu_peak(opened.skeleton.device)
    checkpoint, skeleton = opened.checkpoint, opened.skeleton
    seqlen = resolve_seqlen(request.seqlen, opened.positions)
    memory.settle_allocator(opened.boundary_bytes(seqlen))
    samples_NT = evaluation_windows(
        open_source(request.evaluation_text, "evaluation", request.text_column),
        load_tokenizer(checkpoint.folder),
        seqlen=seqlen,
        windows=request.windows,
    )
    count = len(samples_NT)
    progress = Progress(
        [
            Stage(name="embed", steps=count, cost=0),
            Stage(name="forward", steps=skeleton.depth, cost=1),
            Stage(name="loss", steps=count, cost=1 / skeleton.depth),
        ],
        listener,
    )
    made = plan_evaluation(opened, request, nsamples=count, seqlen=seqlen)
    with (
        tempfile.TemporaryDirectory(prefix="lowmem-gblm-", dir=_work_folder(request)) as folder,
        Spill(Path(folder) / "boundaries", made.host_spill_bytes) as spill,
    ):
        with progress.stage("embed"):
            skeleton.fill(checkpoint)
            embed(skeleton, samples_NT, spill, progress)
        with progress.stage("forward"):
            blocks = BlockStream(checkpoint, skeleton)
            dense_sweep(blocks, skeleton, spill, count, progress, keep=False)
        with progress.stage("loss"):
            losses = losses_of(skeleton, samples_NT, spill, skeleton.depth, progress)
    mean = sum(losses) / count
    if not math.isfinite(mean):
        sick = next(n for n, loss in enumerate(losses) if not math.isfinite(loss))
        raise NonFiniteError(
            f"window {sick} of {request.evaluation_text} has the loss {losses[sick]}"
        )
    return {
        "model": request.model,
        "text": request.evaluation_text,
        "seqlen": seqlen,
        "windows": count,
        "perplexity": math.exp(mean),
        "seconds": {**progress.seconds, "total": progress.total_seconds()},
        "memory": {
            "host_peak_bytes": memory.host_peak_bytes(),
            "gpu_peak_bytes": memory.gpu_peak_bytes(skeleton.device),
        },
    }


def _work_folder(request: EvalRequest) -> Path | None:
    """Where boundaries wait: as asked, else where temporary files outlive memory; None: anywhere.

    The usual folder for temporary files is often held in memory.
    """
    if request.work_dir is not None:
        request.work_dir.mkdir(parents=True, exist_ok=True)
        return request.work_dir
    return _ON_DISK if os.access(_ON_DISK, os.W_OK) else None
