"""Writing to a terminal that may be gone: closed, a broken pipe, a full disk.

Text that cannot be written is dropped, at the exit of the interpreter too: a result that is stored
on the disk is not lost for lack of a terminal.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

PROGRAM = "lowmem-gblm"


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
        write(sys.stderr, f"{PROGRAM}: {text}\n")


def reserve_streams() -> None:
    """Open stdin, stdout and stderr on nothing if the caller has closed them.

    Otherwise a file of ours could get number 2, and libraries would write their messages into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
