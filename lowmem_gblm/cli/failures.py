"""The failures of a command: an exit code, a sentence on stderr, and for programs a JSON object."""

import errno
import json
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass

from lowmem_gblm.cli.streams import tell, write
from lowmem_gblm.errors import BudgetError, LowmemGblmError, RequestError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_SMALLER = "Try a smaller --seqlen, or --device cpu"
_UNFORESEEN = 1


@dataclass(frozen=True)
class Failure:
    """Why a command ends: its exit code, the name of the error's class, and a sentence."""

    code: int
    kind: str
    message: str

    @property
    def foreseen(self) -> bool:
        """Return whether the sentence is all that a user needs, as it is not for a bug."""
        return self.code != _UNFORESEEN

    def end(self, *, as_json: bool) -> int:
        """Say why the command ends; return its exit code."""
        tell(self.message)
        if as_json:
            self.print_json()
        return self.code

    def print_json(self) -> None:
        """Write one object to stdout, if that is still open."""
        found = {"code": self.code, "kind": self.kind, "message": self.message}
        with suppress(OSError):
            write(sys.stdout, json.dumps({"error": found}, ensure_ascii=False) + "\n")


def failure_of(error: Exception) -> Failure:
    """Return what a command says of an error."""
    # torch.OutOfMemoryError by its name: torch may not have been imported at all.
    kind = type(error).__name__
    if isinstance(error, LowmemGblmError):
        return Failure(error.exit_code, kind, str(error))
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return Failure(BudgetError.exit_code, kind, f"out of memory: {error}. {_SMALLER}")
    if isinstance(error, OSError):
        code = BudgetError.exit_code if error.errno in _FULL_DISK else RequestError.exit_code
        where = f"{error.strerror}: {error.filename or 'while writing'}"
        return Failure(code, kind, where if error.strerror else str(error))
    return Failure(_UNFORESEEN, kind, str(error))


def show_traceback(error: Exception) -> None:
    """Write where an error comes from to stderr, if that is still open."""
    with suppress(OSError):
        write(sys.stderr, "".join(traceback.format_exception(error)))
