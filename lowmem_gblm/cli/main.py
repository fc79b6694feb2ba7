"""The command line: argv to an action, one call, an exit code.

Results go to stdout (with `--json`, exactly one JSON object), progress and errors to stderr.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lowmem_gblm.cli.actions import Outcome
from lowmem_gblm.cli.console import Console, announced
from lowmem_gblm.cli.failures import Failure, failure_of, show_traceback
from lowmem_gblm.cli.interruptions import RECORD, made
from lowmem_gblm.cli.parser import parsed
from lowmem_gblm.cli.streams import PROGRAM, reserve_streams, tell, write
from lowmem_gblm.errors import INTERRUPTED, UsageError
from lowmem_gblm.runtime.signals import raise_on_signals

_ENDED = "lowmem-gblm: ended at once. To resume, or to begin again:"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (see `lowmem_gblm.errors`)."""
    reserve_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = parsed(words)
    except UsageError as error:
        with suppress(OSError):
            write(sys.stderr, error.usage)
        return failure_of(error).end(as_json="--json" in words)
    _quiet_libraries(arguments)
    typed = shlex.join([*(_program() if argv is None else [PROGRAM]), *words])
    as_json = arguments.json
    try:
        display = Console(None if arguments.quiet else sys.stderr, verbose=arguments.verbose)
        # Python drops what a signal raises while the handler of the log is freed: that comes last.
        with (
            announced(display, verbose=arguments.verbose),
            raise_on_signals(f"{_ENDED}\n{typed}\n", ends=argv is None),
        ):
            with display as console:
                outcome = arguments.run(arguments, console)
            _print(outcome, as_json=as_json)
            # Stdout has its one object.
            as_json = False
            return 0
    except KeyboardInterrupt as stopped:
        arguments.stopped = stopped
        failure = _interrupted(arguments, typed)
    except Exception as error:
        failure = failure_of(error)
        if not failure.foreseen:
            if as_json:
                failure.print_json()
            raise
        if arguments.verbose:
            show_traceback(error)
    return failure.end(as_json=as_json)


def _interrupted(arguments: argparse.Namespace, typed: str) -> Failure:
    """Return the failure of an interrupted command, which says how to resume it."""
    hint = arguments.interrupted(arguments)
    said = (
        f", but {made(arguments)} is complete already." if hint is None else f". {hint}:\n{typed}"
    )
    return Failure(INTERRUPTED, KeyboardInterrupt.__name__, f"interrupted{said}")


def _program() -> list[str]:
    """Return the words that call this program from the same terminal."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return [sys.executable, "-m", "lowmem_gblm"]
    if called.name == PROGRAM and shutil.which(PROGRAM) is None:
        return [str(called)]
    return [PROGRAM]


def _quiet_libraries(arguments: argparse.Namespace) -> None:
    """Turn off messages of libraries, before their first import; `-q` their progress, too."""
    if arguments.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _print(outcome: Outcome, *, as_json: bool) -> None:
    """Print an outcome; if that fails, name the record that has it."""
    result, lines, folder = outcome
    text = json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines)
    try:
        write(sys.stdout, f"{text}\n")
    except OSError as error:
        if folder is None:
            raise
        tell(f"the result could not be printed ({error}): it is in {folder / RECORD}")
