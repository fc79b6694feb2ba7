"""Folders that belong to one job: marked as ours, locked while the process lives.

Model folders are locked, too: many processes may read one, or one process may overwrite it.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem_gblm.errors import JobError
from lowmem_gblm.runtime.posix import fcntl
from lowmem_gblm.storage.atomic import TEMPORARY, flush_folder
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.raw_io import opened

MARK = ".lowmem-gblm"
# The unit of `st_blocks`, whatever the file system.
_DISK_BLOCK_BYTES = 512


def size_on_disk(folder: Path) -> int:
    """Return the bytes that all files in a folder take; 0 if the folder does not exist.

    What has not been written yet of a file takes nothing.
    """
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(min(one.st_size, one.st_blocks * _DISK_BLOCK_BYTES) for one in found)


class OwnedFolder:
    """A folder for this process alone; created if it does not exist.

    The mark, with the text `owner`, tells it from other folders. The lock on the mark is the
    kernel's, so a dead process does not keep it. Raises `JobError` if the folder exists without
    the mark, or another process is using it.
    """

    def __init__(self, path: Path, owner: str = "") -> None:
        self.path = path
        # An empty folder may be ours, left by an attempt that was killed between two operations.
        foreign = path.exists() and not (path / MARK).is_file()
        if foreign and (not path.is_dir() or any(path.iterdir())):
            raise JobError(
                f"{path} exists and was not made by lowmem-gblm: move it away, or choose another "
                f"place"
            )
        _make(path)
        # Held until release or remove.
        self._lock = open(path / MARK, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_still_there()
            with blamed(path / MARK, "the mark of the folder"):
                self._lock.truncate(0)
                self._lock.write(os.fsencode(owner))
        except BlockingIOError:
            self._lock.close()
            raise JobError(f"another process is using {path}: wait for it, or end it") from None
        except OSError:
            self._lock.close()
            raise

    def _check_still_there(self) -> None:
        """Raise `BlockingIOError` if another process has just removed the folder, with its lock."""
        try:
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / MARK)):
                return
        except FileNotFoundError:
            pass
        raise BlockingIOError

    def empty(self, but: Collection[str] = ()) -> None:
        """Remove what an earlier process left in the folder, except files of these names."""
        for child in self.path.iterdir():
            if child.name in but:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != MARK:
                child.unlink()

    def remove_temporary(self) -> None:
        """Remove the files that an earlier process had not finished writing."""
        for child in self.path.rglob(f"*{TEMPORARY}"):
            child.unlink()

    def close(self) -> None:
        """Unlock the folder for other processes and leave it as it is."""
        self._lock.close()

    def release(self, path: Path) -> None:
        """Remove the mark from the folder, which is called `path` now, and unlock it."""
        (path / MARK).unlink(missing_ok=True)
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder and its files, as far as the disk permits; the mark goes last."""
        with suppress(OSError):
            self.empty()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def owner_of(path: Path) -> str:
    """Return the text of the mark of a folder; empty if it has none."""
    mark = path / MARK
    return os.fsdecode(mark.read_bytes()) if mark.is_file() else ""


@contextmanager
def model_lock(model: Path, *, alone: bool) -> Iterator[None]:
    """Hold a model folder: together with all who read it, or alone, to overwrite it.

    The lock is the kernel's; on file systems without locks it excludes no process. Raises
    `JobError` if another process overwrites the model; or, if `alone`, reads it.
    """
    with opened(model) as descriptor:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "is using" if alone else "is overwriting"
            raise JobError(f"another process {what} {model}: wait for it, or end it") from None
        except OSError:
            pass
        yield


def _make(path: Path) -> None:
    """Create a folder, and those above it, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with suppress(PermissionError):
            flush_folder(folder.parent)
