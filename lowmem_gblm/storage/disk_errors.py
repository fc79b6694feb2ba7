"""A disk that fills up or fails in the middle of a run: which error it is, and its sentence."""

import errno
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowmem_gblm.errors import DiskError, DiskFull

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
# Anything else, such as a folder without permission, is wrong from the start and says so itself.
_FAILING = {errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE, errno.ENXIO, errno.ENODEV}


@contextmanager
def blamed(path: Path, holds: str = "") -> Iterator[None]:
    """Run the body; an error of the system in it names `path`, unless it names a file itself.

    The sentence about the error says what the file `holds`; without that, its name.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        if holds and not hasattr(error, "holds"):
            vars(error)["holds"] = holds
        raise


def is_trouble(error: OSError) -> bool:
    """Return whether an error says that a disk is full or failing."""
    return error.errno in _FULL or error.errno in _FAILING


def explained(error: OSError, needs: str, what_to_do: str) -> DiskFull | DiskError:
    """Return the error of the system as one with a sentence for the user.

    `needs` says how much is still needed and how much is free, and where; empty if not known.
    """
    path = Path(str(error.filename or "a file of this run"))
    what = getattr(error, "holds", "") or f"the file {path.name.removesuffix('.tmp')}"
    failed = f"{what} could not be written to {path}"
    if error.errno in _FULL:
        wanting = f"{failed}, {needs}" if needs else failed
        return DiskFull(f"{_FULL[error.errno]}: {wanting}: make room, then {what_to_do}")
    failed = f"{what} could not be written to or read from {path}"
    if error.errno in _FAILING:
        return DiskError(
            f"a disk is failing ({error.strerror}): {failed}: look after that disk, then "
            f"{what_to_do}"
        )
    return DiskError(f"{failed} ({error.strerror}): mend that, then {what_to_do}")


def to_resume(work_folder: Path, *, kept: bool) -> str:
    """Say what to do after an attempt that has ended early, where the job is `kept` or not."""
    if not kept:
        return "give the same command again; nothing was done yet that could be kept"
    command = resume_command(work_folder)
    return f"give the same command again, or {command}, which resumes from what is done"


def to_resume_or_discard(work_folder: Path, discarded: Sequence[Path]) -> str:
    """Say how to resume a job that an error has ended, and what to remove to discard it."""
    kept = f"What is done is kept in {work_folder}: {resume_command(work_folder)} resumes it"
    if not discarded:
        return kept
    return f"{kept}; to discard it, remove {' and '.join(map(str, discarded))}"


def resume_command(work_folder: Path) -> str:
    """Return what to type to resume a job."""
    return shlex.join(["lowmem-gblm", "resume", str(work_folder)])
