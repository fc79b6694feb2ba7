"""Bytes of files: at an offset until all is done, or in pieces, with their size and hash.

Every function raises OSError if the disk is full or failing.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from lowmem_gblm.storage.disk_errors import blamed

PIECE_BYTES = 1 << 20
Bytes = bytes | memoryview


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file or folder; the body gets its descriptor."""
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` on; return the bytes read: fewer only if the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from `offset` on."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        offset += count
        data = data[count:]


def file_pieces(path: Path, holds: str = "") -> Iterator[bytes]:
    """Yield the bytes of a file in pieces; `holds` is for the sentence about an error."""
    with open(path, "rb") as file, blamed(path, holds):
        while piece := file.read(PIECE_BYTES):
            yield piece


def pieces_between(descriptor: int, start: int, end: int) -> Iterator[Bytes]:
    """Yield the bytes of an open file between two offsets in pieces; fewer if it ends before."""
    for offset in range(start, end, PIECE_BYTES):
        piece = memoryview(bytearray(min(PIECE_BYTES, end - offset)))
        yield piece[: read_at(descriptor, piece, offset)]


def checked(pieces: Iterable[Bytes], check: Callable[[], None]) -> Iterator[Bytes]:
    """Yield all pieces, each after a call of `check`, which may raise to stop."""
    for piece in pieces:
        check()
        yield piece


def summary(
    pieces: Iterable[Bytes], write: Callable[[Bytes], object] = lambda piece: None
) -> dict[str, Any]:
    """Give every piece to `write`; return `bytes` and `sha256` of all of them together."""
    size, hashed = 0, sha256()
    for piece in pieces:
        write(piece)
        hashed.update(piece)
        size += len(piece)
    return {"bytes": size, "sha256": hashed.hexdigest()}
