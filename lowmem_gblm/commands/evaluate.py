"""Perplexity of a text and results of language tasks, one decoder block resident at a time."""

from pathlib import Path
from typing import Any

from lowmem_gblm.commands.perplexity import TextPerplexity
from lowmem_gblm.commands.request import EvalRequest
from lowmem_gblm.commands.scoring import model_to_score, score
from lowmem_gblm.commands.tasks import TaskSuite
from lowmem_gblm.runtime.activity import activity
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.strict_json import read_json


def evaluate(request: EvalRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Measure what is asked for, in one sweep over the blocks.

    Perplexity is in the result if a text is asked for, or no task; see `TextPerplexity`. The
    results of tasks are those of lm-evaluation-harness; see `commands.tasks`.
    """
    with model_to_score(request.model, request) as opened:
        result: dict[str, Any] = {"model": request.model, "job": _pruned_by(opened.folder)}
        measures: list[TextPerplexity | TaskSuite] = []
        if request.measures_text:
            with activity("cutting the text into windows"):
                measures.append(TextPerplexity(request, opened))
        if request.tasks:
            with activity("making the requests of the tasks"):
                measures.append(TaskSuite(request, opened))
        rows = [row for measure in measures for row in measure.rows]
        scored = score(opened, request, rows, listener, packed=bool(request.tasks))
        for measure in measures:
            result |= measure.result(scored.scores)
    return result | {"seconds": scored.seconds, "memory": scored.memory}


def _pruned_by(folder: Path) -> str | None:
    """Return the job that has pruned a model, by which `report` knows the output; None if dense."""
    record = folder / RECORD
    return read_json(record).get("job") if record.is_file() else None
