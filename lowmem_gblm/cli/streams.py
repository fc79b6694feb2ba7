"""Writing to a terminal that may be gone: closed, a broken pipe, a full disk.

What cannot be written is dropped, at the exit of the interpreter too: no result that lies on the
disk is lost for want of somebody to tell.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from lowmem_gblm.errors import BudgetError, RequestError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def write(stream: TextIO | None, text: str) -> None:
    """Write all of a text now.

    Raises:
        OSError: It could not be: a closed pipe or terminal, a full disk. What was not written, and
            what is written from then on, goes nowhere, at the exit of the interpreter, too.
    """
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        stream.write(text.encode(errors="backslashreplace").decode())
        stream.flush()
    except (OSError, ValueError) as error:
        _lead_nowhere(stream)
        raise error if isinstance(error, OSError) else OSError(str(error)) from None


def tell(text: str) -> None:
    """Write a line to stderr, if that is still there."""
    with suppress(OSError):
        write(sys.stderr, f"lowmem-gblm: {text}\n")


def fail(message: str, code: int) -> int:
    """Tell why a command ends; returns its exit code."""
    tell(message)
    return code


def fail_of_system(error: OSError) -> int:
    """The same for what the system has refused."""
    code = BudgetError.exit_code if error.errno in _FULL_DISK else RequestError.exit_code
    where = f"{error.strerror}: {error.filename or 'while writing'}"
    return fail(where if error.strerror else str(error), code)


class Parser(argparse.ArgumentParser):
    """One whose help fails like any result if nobody can read it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            write(file, message)
        except OSError as error:
            if file is not sys.stderr:
                raise SystemExit(fail_of_system(error)) from None


def reserve_streams() -> None:
    """Where the caller has closed stdin, stdout or stderr, let no file of ours get its number.

    What libraries write to number 2 would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _lead_nowhere(stream: TextIO) -> None:
    """Where a stream has a descriptor, let that be the one of nothing."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())
