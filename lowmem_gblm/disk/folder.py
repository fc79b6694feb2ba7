"""Folders that belong to one job: marked as ours, locked while the process lives."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from lowmem_gblm.disk.publish import TEMPORARY
from lowmem_gblm.errors import JobError

MARK = ".lowmem-gblm"


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a folder; 0 for one that is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class OwnFolder:
    """A folder for this process alone; made if it is not there.

    The mark tells it from a folder of somebody else's. The lock on the mark is the kernel's, so a
    dead process does not keep it.

    Raises:
        JobError: The folder exists without the mark, or another process is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # An empty one may be our own, left by an attempt that was killed between two operations.
        if path.exists() and not (path / MARK).is_file() and not _is_empty(path):
            raise JobError(
                f"{path} exists and was not made by lowmem-gblm: move it away, or choose another "
                f"place"
            )
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / MARK, "ab")  # noqa: SIM115 - held until release or remove
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise JobError(f"another process is using {path}: wait for it, or end it") from None

    def empty(self, but: Collection[str] = ()) -> None:
        """Remove what an earlier process left there, but for files of these names."""
        for child in self.path.iterdir():
            if child.name in but:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != MARK:
                child.unlink()

    def remove_temporary(self) -> None:
        """Remove what an earlier process had not finished writing."""
        for child in self.path.rglob(f"*{TEMPORARY}"):
            child.unlink()

    def close(self) -> None:
        """Let others use the folder; it stays as it is."""
        self._lock.close()

    def release(self, path: Path) -> None:
        """Give up the folder, by now called `path`, and keep its content."""
        (path / MARK).unlink()
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder and what is in it, as far as the disk lets us; the mark goes last."""
        with suppress(OSError):
            self.empty()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
