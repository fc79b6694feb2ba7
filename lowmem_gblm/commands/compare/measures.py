"""What is measured of every model of a comparison, and what was asked for to measure it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.evaluate import evaluate
from lowmem_gblm.commands.request import EvalRequest, PruneRequest
from lowmem_gblm.commands.texts import NAMED
from lowmem_gblm.options import options
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.raw_io import file_pieces, summary

_NO_TASKS: dict[str, Any] = {"tasks": (), "include_path": None, "num_fewshot": None, "limit": None}


def evaluations(shared: PruneRequest, given: Mapping[str, Any]) -> list[EvalRequest]:
    """Return the requests that measure a model; of the dense one, whose `model` is to be replaced.

    One sweep measures all. Where samples have a length of their own, tasks are a second sweep:
    questions are not cut to that length.

    Args:
        given: Values of `grid.EVALUATION`; the other options are those of `shared`.
    """
    both = {one.name for one in fields(PruneRequest)} & {one.name for one in fields(EvalRequest)}
    request = EvalRequest(**{name: getattr(shared, name) for name in both}, **given)
    if request.measures_text:
        # The embedded text of the dense model is also used to measure the pruned ones.
        request = replace(request, text=request.evaluation_text)
    if not request.tasks or request.seqlen is None:
        return [request]
    tasks = replace(request, text=None, windows=None, seqlen=None)
    return [replace(request, **_NO_TASKS), tasks] if request.measures_text else [tasks]


def measure(
    requests: Sequence[EvalRequest], model: str, listener: Listener | None
) -> dict[str, Any]:
    """Return what `evaluate` says of a model, and `asked`: what else would give another result."""
    asked = asked_for(requests)
    result: dict[str, Any] = {}
    for request in requests:
        result |= evaluate(replace(request, model=model), listener)
    # The harness has NaN where a number is undefined; JSON has not.
    finite: dict[str, Any] = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return finite | {"asked": asked}


def asked_for(requests: Sequence[EvalRequest]) -> list[dict[str, Any]]:
    """Return the options that decide what is measured, and the hash of a text of one's own."""
    return [_plain(request) | {"text_sha256": _hash_of(request.text)} for request in requests]


def _plain(request: EvalRequest) -> dict[str, Any]:
    values = {
        one.name: getattr(request, one.name)
        for one in options(EvalRequest)
        if one.metadata["identity"]
    }
    values["tasks"] = list(request.tasks)
    values["include_path"] = request.include_path and str(request.include_path.resolve())
    return values


def _hash_of(text: str | None) -> str | None:
    if text is None or text in NAMED or not Path(text).is_file():
        return None
    found: str = summary(file_pieces(Path(text)))["sha256"]
    return found
