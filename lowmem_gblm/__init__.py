"""Prune large language models with gradients, one decoder block in memory at a time.

The Python API has the shape of the command line:

    >>> import lowmem_gblm
    >>> record = lowmem_gblm.prune("demo", "pruned", nsamples=16)
    >>> lowmem_gblm.evaluate("pruned", text="demo")["perplexity"]
    >>> lowmem_gblm.verify("pruned", against="demo")
    >>> lowmem_gblm.report("pruned", html="masks.html")["headlines"]
    >>> lowmem_gblm.plan("demo", method="wanda", cpu_memory="1GiB")["flops"]
    >>> lowmem_gblm.resume("interrupted.work", listener=lowmem_gblm.ProgressBar())

`help(lowmem_gblm.prune)` says what every option means. Every error that is raised on purpose, as
for a wrong value of an option, is a `LowmemGblmError`; its subclasses are in `lowmem_gblm.errors`.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from lowmem_gblm.errors import LowmemGblmError

if TYPE_CHECKING:
    from lowmem_gblm.api.outputs import pack, report, unpack, upload, verify
    from lowmem_gblm.api.runs import compare, evaluate, plan, prune, resume
    from lowmem_gblm.commands.request import EvalRequest, PruneRequest
    from lowmem_gblm.runtime.progress import Listener, Tick
    from lowmem_gblm.runtime.progress_bar import ProgressBar

# Read by torch when it is imported: large CPU tensors then begin at huge pages, which saves most of
# their page faults. Without effect if torch was imported before.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Read by GNU OpenMP, likewise: for how long a thread that waits for the others keeps its core busy.
# The default is milliseconds, and whatever else wants a core holds up every operation.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Read by oneDNN when it is first used: of how many products in half precision it keeps the code, a
# megabyte each. Every number of rows has its own, and experts see another one in every sample: with
# the default of 1024, memory would grow by a gigabyte. The plan counts what 128 take.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

__version__ = "0.2.0"
__all__ = [
    "EvalRequest",
    "Listener",
    "LowmemGblmError",
    "ProgressBar",
    "PruneRequest",
    "Tick",
    "compare",
    "evaluate",
    "pack",
    "plan",
    "prune",
    "report",
    "resume",
    "unpack",
    "upload",
    "verify",
]

# Modules of names that are imported on first use, so that `lowmem-gblm --help` is fast. No module
# may have the name of a function, or importing it would hide the function.
_MODULES = {
    **dict.fromkeys(("compare", "evaluate", "plan", "prune", "resume"), "lowmem_gblm.api.runs"),
    **dict.fromkeys(("pack", "report", "unpack", "upload", "verify"), "lowmem_gblm.api.outputs"),
    "EvalRequest": "lowmem_gblm.commands.request",
    "Listener": "lowmem_gblm.runtime.progress",
    "ProgressBar": "lowmem_gblm.runtime.progress_bar",
    "PruneRequest": "lowmem_gblm.commands.request",
    "Tick": "lowmem_gblm.runtime.progress",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
