"""Start a process with the pretended device, and return what it finds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from support.forks import run_forked

TESTS = Path(__file__).parents[2]
# Set, it gives a test process the pretended device.
PRETENDS = "LOWMEM_GBLM_TESTS_PRETEND"


def in_process(module: str, asked: Any) -> Any:
    """Run a module of this package on a JSON value; return the JSON value that it prints."""
    name = f"support.pretend.{module}"
    done = run_forked(runpy.run_module, name, None, "__main__", input=json.dumps(asked))
    assert done.code == 0, done.err
    return json.loads(done.out)
