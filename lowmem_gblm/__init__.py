"""Prune large language models with gradients, one decoder block in memory at a time.

The Python API has the shape of the command line:

    >>> import lowmem_gblm
    >>> record = lowmem_gblm.prune("demo", "pruned", nsamples=16)
    >>> lowmem_gblm.evaluate("pruned", text="demo")["perplexity"]
    >>> lowmem_gblm.verify("pruned", against="demo")
    >>> lowmem_gblm.report("pruned", html="masks.html")["headlines"]
    >>> lowmem_gblm.plan("demo", method="wanda")["flops"]

Options are those of `lowmem-gblm prune --help`, as keywords with underscores. Every error that is
raised on purpose is a `LowmemGblmError`; its subclasses are in `lowmem_gblm.errors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_gblm.errors import LowmemGblmError

if TYPE_CHECKING:
    from lowmem_gblm.commands.request import EvalRequest, PruneRequest
    from lowmem_gblm.runtime.progress import Listener, Tick

# Read by torch when it is imported: large CPU tensors then begin at huge pages, which saves most of
# their page faults. Without effect if torch was imported before.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Read by GNU OpenMP, likewise: for how long a thread that waits for the others keeps its core busy.
# The default is milliseconds, and whatever else wants a core holds up every operation.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.2.0"
__all__ = [
    "EvalRequest",
    "Listener",
    "LowmemGblmError",
    "PruneRequest",
    "Tick",
    "compare",
    "evaluate",
    "plan",
    "prune",
    "report",
    "verify",
]

# Modules of names that are imported on first use.
_MODULES = {
    "EvalRequest": "lowmem_gblm.commands.request",
    "Listener": "lowmem_gblm.runtime.progress",
    "PruneRequest": "lowmem_gblm.commands.request",
    "Tick": "lowmem_gblm.runtime.progress",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


# The functions import when they are called, so that `lowmem-gblm --help` is fast. No module of the
# package may have the name of one of them, or importing it would hide the function.


def prune(
    model: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    listener: Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Prune `model` into the new folder `output`, or in place; return the content of pruning.json.

    Args:
        model: Folder, Hub id, or "demo".
        output: Folder to create; None with `in_place=True, overwrite_my_only_copy=True`, which
            overwrites the weights of `model` itself.
        listener: Called with a `lowmem_gblm.Tick` after every step.
        options: Fields of `lowmem_gblm.PruneRequest`, and options of the method.

    Raises:
        LowmemGblmError: The run has failed; nothing is left under the name `output`.
    """
    from lowmem_gblm.commands.prune.pipeline import prune as run
    from lowmem_gblm.commands.request import prune_request

    folder = None if output is None else Path(output)
    return run(prune_request(fspath(model), folder, **options), listener)


def plan(model: str | PathLike[str], **options: Any) -> dict[str, Any]:
    """Return what pruning `model` would take, from headers or config.json; options as for `prune`.

    This measures the machine for about two seconds.

    Raises:
        BudgetError: The run does not fit `cpu_memory`, `gpu_memory` or `disk`.
        LowmemGblmError: The request is bad, or the model cannot be used.
    """
    from lowmem_gblm.commands.plan import plan_request
    from lowmem_gblm.commands.request import prune_request

    return plan_request(prune_request(fspath(model), **options)).as_json()


def evaluate(
    model: str | PathLike[str], *, listener: Listener | None = None, **options: Any
) -> dict[str, Any]:
    """Measure the perplexity of `model`; options are the fields of `lowmem_gblm.EvalRequest`."""
    from lowmem_gblm.commands.evaluate import evaluate as run
    from lowmem_gblm.commands.request import EvalRequest

    return run(EvalRequest(model=fspath(model), **options), listener)


def compare(
    model: str | PathLike[str],
    methods: list[str],
    folder: str | PathLike[str],
    *,
    sparsity: Any = (),
    pattern: Any = (),
    seeds: Any = None,
    keep: str = "all",
    listener: Listener | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Prune `model` in every way of a grid into `folder`, measure each result, and return the rows.

    Args:
        model: Folder, Hub id, or "demo".
        folder: Gets an output for every run, called `METHOD` if only methods vary.
        sparsity, pattern, seeds: One value or several; without `seeds`, the `seed` of `prune`.
        keep: "all" outputs, the "best" of every sparsity and pattern, or "none".
        listener: Called with a `lowmem_gblm.Tick` after every step.
        options: Those of `prune`, shared by all methods; those of methods, with one value or
            several, for the methods that have them; and `text`, `windows`, `tasks`, `include_path`,
            `num_fewshot` and `limit` of `evaluate`.
    """
    from lowmem_gblm.commands.compare.grid import EVALUATION, Grid
    from lowmem_gblm.commands.compare.pipeline import compare as run
    from lowmem_gblm.commands.request import PruneRequest, sort_options

    evaluation = {name: options.pop(name) for name in EVALUATION if name in options}
    values, method_options = sort_options(options)
    shared = PruneRequest(model=fspath(model), **values)
    seeds = shared.seed if seeds is None else seeds
    grid = Grid(methods=methods, sparsity=sparsity, pattern=pattern, seeds=seeds, keep=keep)
    return run(shared, grid, Path(folder), evaluation, method_options, listener)


def verify(
    output: str | PathLike[str], against: str | PathLike[str] | None = None
) -> dict[str, Any]:
    """Prove that `output` keeps its promises; `against` is the dense model it was pruned from.

    Raises:
        VerificationError: A promise is broken; names the first violations.
        LowmemGblmError: A folder cannot be read.
    """
    from lowmem_gblm.commands.verify import verify as run

    return run(fspath(output), None if against is None else fspath(against))


def report(
    output: str | PathLike[str],
    against: Iterable[str | PathLike[str]] = (),
    html: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure the structure of the masks of `output`, and of others of the same model beside it.

    Args:
        output: Folder made by `prune`.
        against: Other such folders.
        html: File for a page that shows the numbers; an earlier report there is replaced.

    Raises:
        LowmemGblmError: A folder is no output, or one of another model, or the page cannot be
            written there.
    """
    from lowmem_gblm.commands.report.pipeline import report as run

    return run(
        fspath(output), [fspath(one) for one in against], None if html is None else Path(html)
    )
