"""Writing to a terminal that may be gone: closed, a broken pipe, a full disk.

Text that cannot be written is dropped, at the exit of the interpreter too: a result that is stored
on the disk is not lost for lack of a terminal.
"""

import argparse
import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from lowmem_gblm.errors import BudgetError, RequestError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def write(stream: TextIO | None, text: str) -> None:
    """Write all of a text and flush it; after an OSError all further text is dropped."""
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        stream.write(text.encode(errors="backslashreplace").decode())
        stream.flush()
    except (OSError, ValueError) as error:
        # The interpreter must not fail on the same text at its exit.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        raise error if isinstance(error, OSError) else OSError(str(error)) from None


def tell(text: str) -> None:
    """Write a line to stderr, if that is still open."""
    with suppress(OSError):
        write(sys.stderr, f"lowmem-gblm: {text}\n")


def fail(message: str, code: int) -> int:
    """Write why a command ends to stderr; return its exit code."""
    tell(message)
    return code


def fail_of_system(error: OSError) -> int:
    """Write what the system has refused to stderr; return the exit code."""
    code = BudgetError.exit_code if error.errno in _FULL_DISK else RequestError.exit_code
    where = f"{error.strerror}: {error.filename or 'while writing'}"
    return fail(where if error.strerror else str(error), code)


class Parser(argparse.ArgumentParser):
    """A parser whose help fails like any result if stdout is gone."""

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            write(file, message)
        except OSError as error:
            if file is not sys.stderr:
                raise SystemExit(fail_of_system(error)) from None


def reserve_streams() -> None:
    """Open stdin, stdout and stderr on nothing if the caller has closed them.

    Otherwise a file of ours could get number 2, and libraries would write their messages into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
