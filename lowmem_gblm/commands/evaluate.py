"""Perplexity of a text, one decoder block resident at a time."""

from pathlib import Path
from typing import Any

from lowmem_gblm.commands.perplexity import TextPerplexity
from lowmem_gblm.commands.request import EvalRequest
from lowmem_gblm.commands.scoring import model_to_score, score
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.strict_json import read_json


def evaluate(request: EvalRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Measure perplexity in one sweep over the blocks; see `TextPerplexity`."""
    with model_to_score(request.model, request) as opened:
        job = _pruned_by(opened.folder)
        text = TextPerplexity(request, opened)
        scored = score(opened, request, text.rows, listener, packed=False)
        result = text.result(scored.scores)
    return {"model": request.model, "job": job, **result, "seconds": scored.seconds, "memory": scored.memory}


def _pruned_by(folder: Path) -> str | None:
    """Return the job that has pruned a model, by which `report` knows the output; None if dense."""
    record = folder / RECORD
    return read_json(record).get("job") if record.is_file() else None
