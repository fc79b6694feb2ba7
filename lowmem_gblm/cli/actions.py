"""The actions: what was typed to a request, one call, and the outcome as JSON and as lines."""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_gblm.cli.comparison import TABLES
from lowmem_gblm.cli.completion import script
from lowmem_gblm.cli.console import (
    Console,
    evaluation_lines,
    pack_lines,
    plan_lines,
    prune_lines,
    tensor_lines,
    unpack_lines,
)
from lowmem_gblm.cli.interruptions import made
from lowmem_gblm.cli.options import method_options_of, prune_request_from, request_from
from lowmem_gblm.commands.compare.grid import EVALUATION, Grid
from lowmem_gblm.commands.request import MAY_CHANGE, EvalRequest, PruneRequest
from lowmem_gblm.embedded import EMBEDDED, is_embedded
from lowmem_gblm.errors import RequestError
from lowmem_gblm.options import options
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.runtime.activity import activity

DEMO_FOLDER = "lowmem-gblm-demo"
DEMO_METHODS = "magnitude,gradient,wanda,gblm,sparsegpt"
# Half a minute on two cores.
_DEMO_SEQLEN, _DEMO_SAMPLES, _DEMO_WINDOWS = 256, 64, 80
# The functions import when they are called, so that `lowmem-gblm --help` is fast.
importing = partial(activity, "importing PyTorch and transformers")


class Outcome(NamedTuple):
    """The outcome of a command, as JSON and as lines; a record in `folder` says the same."""

    result: dict[str, Any]
    lines: Sequence[str]
    folder: Path | None = None


def prune(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Prune a model into a new folder, or in place."""
    output = None if arguments.output is None else Path(arguments.output)
    return _pruned(prune_request_from(arguments, output), made(arguments), console)


def resume(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Resume the job of a work folder, with what another attempt may change."""
    with importing():
        from lowmem_gblm.commands.paths import paths_of
        from lowmem_gblm.commands.prune.resume import find_job

    given = {name: getattr(arguments, name) for name in MAY_CHANGE}
    request = find_job(Path(arguments.work_folder), **given)
    arguments.output = paths_of(request).output
    return _pruned(request, made(arguments), console)


def _pruned(request: PruneRequest, folder: str, console: Console) -> Outcome:
    with importing():
        from lowmem_gblm.commands.prune.pipeline import prune as run

    record = run(request, console)
    return Outcome(record, prune_lines(record, folder, request.save_statistics), Path(folder))


def plan(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Plan a prune run."""
    with importing():
        from lowmem_gblm.commands.plan import plan_request, prunable_tensors

    request = prune_request_from(arguments)
    if arguments.tensors:
        tensors = prunable_tensors(request)
        return Outcome({"model": request.model, "tensors": tensors}, tensor_lines(tensors))
    planned = plan_request(request).as_json()
    return Outcome(planned, plan_lines(planned))


def evaluate(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Measure perplexity and language tasks."""
    with importing():
        from lowmem_gblm.commands.evaluate import evaluate as run

    result = run(request_from(EvalRequest, arguments), console)
    return Outcome(result, evaluation_lines(result))


def verify(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Prove that an output keeps its promises."""
    with importing():
        from lowmem_gblm.commands.verify import verify as run

    result = run(arguments.output, arguments.against, console)
    checked = f"against {arguments.against}" if arguments.against else "by itself"
    line = (
        f"{arguments.output} keeps its promises, checked {checked}: {result['tensors']} "
        f"tensors, {result['pruned_tensors']} of them pruned to "
        f"{result['sparsity_measured']:.2%} zeros"
    )
    return Outcome(result, [line, *(f"note: {note}" for note in result["notes"])])


def upload(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Verify an output, and upload it to the Hub."""
    with importing():
        from lowmem_gblm.commands.upload import upload as run

    result = run(
        arguments.output, arguments.repo, arguments.against, console, public=arguments.public
    )
    return Outcome(result, [f"uploaded {len(result['files'])} files: {result['url']}"])


def report(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Measure the structure of masks, and write the page that was asked for."""
    with importing():
        from lowmem_gblm.commands.report.pipeline import report as run

    result = run(arguments.output, arguments.against, arguments.html, console)
    written = [f"the report is {arguments.html}"] if arguments.html else []
    return Outcome(result, [*result["headlines"], *written])


def pack(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Store a checkpoint without its zeros."""
    with importing():
        from lowmem_gblm.commands.pack import pack as run

    result = run(arguments.output, Path(arguments.packed), console)
    return Outcome(result, pack_lines(result))


def unpack(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Restore a packed checkpoint."""
    with importing():
        from lowmem_gblm.commands.pack import unpack as run

    result = run(arguments.packed, Path(arguments.output), console)
    return Outcome(result, unpack_lines(result))


def compare(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Prune with several methods and measure every result."""
    request = request_from(PruneRequest, arguments, sparsity=None, pattern=None, method_options={})
    evaluation = {name: getattr(arguments, name) for name in EVALUATION}
    return _compared(arguments, request, Path(arguments.output), evaluation, console)


def demo(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Compare all methods on the embedded model."""
    if not is_embedded(EMBEDDED):
        raise RequestError(
            f"the folder {EMBEDDED} here holds a model of your own, which has that name first: "
            f"run the demo in another folder"
        )
    resources = {one.name: getattr(arguments, one.name) for one in options(Resources)}
    request = PruneRequest(model=EMBEDDED, seqlen=_DEMO_SEQLEN, nsamples=_DEMO_SAMPLES, **resources)
    arguments.output = arguments.output or str(_demo_folder(arguments.methods.split(",")))
    evaluation = {"windows": _DEMO_WINDOWS}
    return _compared(arguments, request, Path(arguments.output), evaluation, console)


def completion(arguments: argparse.Namespace, console: Console) -> Outcome:
    """Return the script with which a shell completes."""
    found = script(arguments.parser, arguments.shell)
    return Outcome({"shell": arguments.shell, "script": found}, [found])


def _compared(
    arguments: argparse.Namespace,
    request: PruneRequest,
    folder: Path,
    evaluation: dict[str, Any],
    console: Console,
) -> Outcome:
    with importing():
        from lowmem_gblm.commands.compare.pipeline import compare as run

    varied = {one.name for one in options(Grid)} & vars(arguments).keys()
    grid = Grid(**{name: getattr(arguments, name) for name in varied})
    given = method_options_of(arguments)
    rows = run(request, grid, folder, evaluation, given, console, console.announce)
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        console.announce(f"note: {note}")
    lines = TABLES[getattr(arguments, "format", "table")](rows)
    return Outcome({"model": request.model, "rows": rows}, lines)


def _demo_folder(methods: Sequence[str]) -> Path:
    """Return the first folder of a demo that was interrupted, or that is not there yet."""
    with importing():
        from lowmem_gblm.commands.compare.ledger import is_unfinished

    names = chain([DEMO_FOLDER], (f"{DEMO_FOLDER}-{number}" for number in count(2)))
    return next(one for one in map(Path, names) if not one.exists() or is_unfinished(one, methods))
