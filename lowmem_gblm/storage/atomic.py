"""The only file that renames.

A file or folder appears under its final name complete or not at all: it is written beside it with a
temporary name, flushed to the disk, renamed, and the folder is flushed too. Every function raises
OSError if the disk is full or failing; `publish_file` leaves no new file then.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.raw_io import Bytes, opened, summary, write_at

TEMPORARY = ".tmp"


def publish_file(
    path: Path, pieces: Iterable[Bytes], holds: str = "", *, replaces: bool = False
) -> dict[str, Any]:
    """Write all pieces to `path`, as a `PendingFile` does; return their `summary`."""
    growing = PendingFile(path, holds, replaces=replaces)
    try:
        written = summary(pieces, growing.append)
        growing.publish()
    except BaseException:
        growing.discard()
        raise
    return written


def publish_json(path: Path, value: Any, holds: str, *, replaces: bool = False) -> None:
    """Write `path` as readable JSON, in the key order of `value`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish_file(path, [text.encode()], holds, replaces=replaces)


def temporary_name(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(path.name + TEMPORARY)


def name_file(path: Path) -> None:
    """Give a file that is durable under its temporary name its final one."""
    os.rename(temporary_name(path), path)
    flush_folder(path.parent)


class PendingFile:
    """A file that is written piece by piece, and has its name only when it is complete.

    Args:
        holds: What the file holds, for the sentence about a disk that fails.
        replaces: Whether a file of this tool that has become untrue may be at `path`; otherwise
            a file there raises `FileExistsError`.
    """

    def __init__(self, path: Path, holds: str = "", *, replaces: bool = False) -> None:
        if path.exists() and not replaces:
            raise FileExistsError(f"{path} exists already")
        self._path = path
        self._size_bytes = 0
        self._holds = holds
        self._temporary = temporary_name(path)
        self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def append(self, data: Bytes) -> int:
        """Write `data` at the end; return its offset in bytes."""
        start = self._size_bytes
        with blamed(self._path, self._holds):
            write_at(self._descriptor, memoryview(data), start)
        self._size_bytes += len(data)
        return start

    def publish(self) -> None:
        """Give the file its name; nothing can be written any more."""
        with blamed(self._path, self._holds):
            os.fsync(self._descriptor)
            name_file(self._path)
        self._close()

    def discard(self) -> None:
        """Remove the file, unless it has been published."""
        if self._descriptor >= 0:
            self._temporary.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def publish_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its final name; raise `JobError` if that exists by now."""
    _check_still_absent(final)
    flush_folder(partial)
    try:
        with blamed(final):
            os.rename(partial, final)
    except OSError:
        _check_still_absent(final)
        raise
    try:
        flush_folder(final.parent)
    except OSError:
        os.rename(final, partial)
        raise


def _check_still_absent(final: Path) -> None:
    if os.path.lexists(final):
        raise JobError(
            f"{final} exists by now: another process made it during the run. Move it away, "
            f"then give the same command again; finished steps of a job are kept"
        )


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    with opened(folder) as descriptor, blamed(folder):
        os.fsync(descriptor)
