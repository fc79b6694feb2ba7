"""Folders that belong to one running job: marked as ours, locked while the process lives."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from lowmem_gblm.errors import JobError

MARK = ".lowmem-gblm"


class OwnFolder:
    """An empty folder for this process alone.

    What an interrupted run left there is removed; the mark tells it from a folder of somebody
    else's. The lock on the mark is the kernel's, so a dead process does not keep it.

    Raises:
        JobError: The folder exists without the mark, or another process is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not (path / MARK).is_file():
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
        self._empty()

    def release(self, path: Path) -> None:
        """Give up the folder, by now called `path`, and keep its content."""
        (path / MARK).unlink()
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _empty(self) -> None:
        for child in self.path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != MARK:
                child.unlink()
