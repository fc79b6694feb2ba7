"""Start a process with the pretended device, and return what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[2]
# Set, it gives a test process the pretended device.
PRETENDS = "LOWMEM_GBLM_TESTS_PRETEND"


def in_process(module: str, asked: Any, *, timeout_s: float = 600) -> Any:
    """Run a module of this package on a JSON value; return the JSON value that it prints.

    A fork would not do: after a backward pass, autograd takes no further device.
    """
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", f"support.pretend.{module}"],
        input=json.dumps(asked),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
