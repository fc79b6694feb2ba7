"""The command line: argv to an action, one call, an exit code.

Results go to stdout (with `--json`, exactly one JSON object), progress and errors to stderr.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem_gblm.cli.actions import Outcome
from lowmem_gblm.cli.interruptions import RECORD, made
from lowmem_gblm.cli.parser import parsed
from lowmem_gblm.cli.streams import fail, fail_of_system, reserve_streams, tell, write
from lowmem_gblm.errors import INTERRUPTED, BudgetError, LowmemGblmError
from lowmem_gblm.runtime.signals import raise_on_signals

_SMALLER = "Try a smaller --seqlen, or --device cpu"
_PROGRAM = "lowmem-gblm"
_ENDED = "lowmem-gblm: ended at once. To resume, or to begin again:"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (see `lowmem_gblm.errors`)."""
    reserve_streams()
    arguments = parsed(argv)
    _quiet_libraries()
    typed = shlex.join([*_program(), *sys.argv[1:]] if argv is None else [_PROGRAM, *argv])
    try:
        with raise_on_signals(f"{_ENDED}\n{typed}\n", ends=argv is None):
            _print(arguments.run(arguments), as_json=arguments.json)
            return 0
    except KeyboardInterrupt:
        hint = arguments.interrupted(arguments)
        if hint is None:
            return fail(f"interrupted, but {made(arguments)} is complete already.", INTERRUPTED)
        return fail(f"interrupted. {hint}:\n{typed}", INTERRUPTED)
    except LowmemGblmError as error:
        return fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError by its name: torch may not have been imported at all.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(f"out of memory: {error}. {_SMALLER}", BudgetError.exit_code)
    except OSError as error:
        return fail_of_system(error)


def _program() -> list[str]:
    """Return the words that call this program from the same terminal."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return [sys.executable, "-m", "lowmem_gblm"]
    if called.name == _PROGRAM and shutil.which(_PROGRAM) is None:
        return [str(called)]
    return [_PROGRAM]


def _quiet_libraries() -> None:
    """Turn off messages of libraries for the user, before their first import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
