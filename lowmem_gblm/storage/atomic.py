"""The only file that renames.

A file or folder appears under its final name complete or not at all: it is written beside it with a
temporary name, flushed to the disk, renamed, and the folder is flushed too. Every function raises
OSError if the disk is full or failing; `publish_file` and `replace_file` leave no file then.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.disk_errors import blamed

TEMPORARY = ".tmp"


class Writable(Protocol):
    """A file whose end can be written to."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append all of `data`; return the number of bytes."""


def publish_file(path: Path, write: Callable[[Writable], object], holds: str = "") -> None:
    """Create `path` with what `write` puts into it; raise `FileExistsError` if it exists."""
    _publish(PendingFile(path, holds), write)


def replace_file(path: Path, data: bytes, holds: str = "") -> None:
    """Write `data` to `path`, in the place of any former file; one of the two is always there."""
    _publish(PendingFile(path, holds, replaces=True), lambda file: file.write(data))


def _publish(growing: PendingFile, write: Callable[[Writable], object]) -> None:
    try:
        write(growing)
        growing.publish()
    except BaseException:
        growing.discard()
        raise


def temporary_name(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(path.name + TEMPORARY)


class PendingFile:
    """A file that is written piece by piece, and has its name only when it is complete.

    Args:
        path: The final name.
        holds: What the file holds, for the sentence about a disk that fails.
        replaces: Whether a file of this tool that has become untrue may be at `path`.

    Raises:
        FileExistsError: `path` exists, and `replaces` is False.
    """

    def __init__(self, path: Path, holds: str = "", *, replaces: bool = False) -> None:
        if path.exists() and not replaces:
            raise FileExistsError(f"{path} exists already")
        self.path = path
        self.size_bytes = 0
        self._holds = holds
        self._temporary = temporary_name(path)
        self.descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def append(self, data: memoryview) -> int:
        """Write `data` at the end; return its offset in bytes."""
        start = self.size_bytes
        with blamed(self.path, self._holds):
            while data:
                count = os.pwrite(self.descriptor, data, self.size_bytes)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                self.size_bytes += count
                data = data[count:]
        return start

    def write(self, data: bytes | memoryview, /) -> int:
        """Append all of `data`; return the number of bytes, as other files do."""
        self.append(memoryview(data))
        return len(data)

    def publish(self) -> None:
        """Give the file its name; nothing can be written any more."""
        with blamed(self.path, self._holds):
            os.fsync(self.descriptor)
            os.rename(self._temporary, self.path)
            flush_folder(self.path.parent)
        self._close()

    def discard(self) -> None:
        """Remove the file, unless it has been published."""
        if self.descriptor >= 0:
            self._temporary.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1


def publish_json(path: Path, value: Any, holds: str) -> None:
    """Create `path` as readable JSON, in the key order of `value`."""
    publish_file(path, lambda file: file.write(_as_json(value)), holds)


def replace_json(path: Path, value: Any, holds: str) -> None:
    """Write `path` as readable JSON, in the place of any former file."""
    replace_file(path, _as_json(value), holds)


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


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
            f"then give the same command again; what is done is kept"
        )


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with blamed(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
