"""Processes of their own that begin with torch and transformers imported.

A server imports them once for all tests of a worker, and forks. A fork of the worker itself would
not do everywhere: after a backward pass autograd takes no further device, and a worker holds more
memory than a command does.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers.modeling_utils"])
# Of a process that hangs; the slowest one takes a tenth of it.
_LONGEST_S = 600


class Done(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int
    out: str
    err: str


def run_forked(
    call: Callable[..., object],
    *given: Any,
    input: str = "",
    env: Mapping[str, str] | None = None,
) -> Done:
    """Calls what can be imported by its name; an int that it returns is the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process = _CONTEXT.Process(target=_be, args=(call, given, input, dict(env or {}), files))
        process.start()
        process.join(_LONGEST_S)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return Done(process.exitcode, *(file.read_text() for file in files))


def _be(
    call: Callable[..., object],
    given: tuple[Any, ...],
    input: str,
    env: dict[str, str],
    files: list[Path],
) -> None:
    os.environ.update(env)
    for number, file in enumerate(files, 1):
        with file.open("w") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdin = io.StringIO(input)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    code = call(*given)
    sys.exit(int(code) if isinstance(code, int) else 0)
