"""Several methods on one model: prune with each, measure each, one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.evaluate import evaluate
from lowmem_gblm.commands.method_options import no_option
from lowmem_gblm.commands.prune.pipeline import prune
from lowmem_gblm.commands.prune.resume import find_finished
from lowmem_gblm.commands.request import EvalRequest, PruneRequest
from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import option_owners
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.pending_folder import check_absent

Announce = Callable[[str], None]


def compare(
    request: PruneRequest,
    methods: Sequence[str],
    folder: Path,
    text: str | None,
    windows: int | None,
    method_options: Mapping[str, Any],
    listener: Listener | None,
    announce: Announce = lambda text: None,
) -> list[dict[str, Any]]:
    """Prune with several methods, measure the perplexity of each result, and return a row for each.

    Called again after an interruption it resumes: a pruned output is only measured. An output that
    is something else raises a `JobError` before anything is done.

    Args:
        request: The shared options; its method and output are replaced.
        folder: Folder for one checkpoint per method, `folder/METHOD`.
        text, windows: Those of the `EvalRequest`; its other options are those of `request`.
        method_options: Options of methods, each for those of `methods` that have it.
        announce: Called with a text about what begins.
    """
    shared = {one.name for one in fields(PruneRequest)} & {one.name for one in fields(EvalRequest)}
    values = {name: getattr(request, name) for name in shared}
    evaluation = EvalRequest(**values, text=text, windows=windows)
    requests = _requests(request, methods, folder, method_options)
    finished = {one.method: find_finished(one) for one in requests}
    for one in requests:
        if finished[one.method] is None:
            check_absent(folder / one.method)
    announce("dense: measuring perplexity")
    dense = evaluate(evaluation, listener)
    # The embedded text of the dense model is also used to measure the pruned ones.
    evaluation = replace(evaluation, text=dense["text"], seqlen=dense["seqlen"])
    rows = [_row("dense", dense["perplexity"], {"sparsity_measured": 0.0}, None)]
    for one in requests:
        record = finished[one.method]
        if record is None:
            announce(f"{one.method}: pruning")
            record = prune(one, listener)
        else:
            announce(f"{one.method}: is pruned already")
        announce(f"{one.method}: measuring perplexity")
        result = evaluate(replace(evaluation, model=str(one.output)), listener)
        rows.append(_row(one.method, result["perplexity"], record, one.output))
    return rows


def _requests(
    request: PruneRequest, methods: Sequence[str], folder: Path, method_options: Mapping[str, Any]
) -> list[PruneRequest]:
    """Return a request for every method, with those of the options that it has."""
    twice = [name for name in methods if list(methods).count(name) > 1]
    if twice:
        raise RequestError(f"--methods names the method {twice[0]} twice")
    owners = option_owners(methods)
    for name in method_options:
        if name not in owners:
            raise no_option(name, methods)
    return [
        replace(
            request,
            method=method,
            output=folder / method,
            method_options={
                name: value for name, value in method_options.items() if method in owners[name]
            },
        )
        for method in methods
    ]


def _row(
    method: str, perplexity: float, record: dict[str, Any], output: Path | None
) -> dict[str, Any]:
    used = record.get("memory", {})
    return {
        "method": method,
        "perplexity": perplexity,
        "sparsity": record["sparsity_measured"],
        "seconds": record.get("seconds", {}).get("total"),
        "host_peak_bytes": used.get("host_peak_bytes"),
        "gpu_peak_bytes": used.get("gpu_peak_bytes"),
        "output": None if output is None else str(output),
    }
