"""What earlier attempts at a job have left in its folders: asked once, under the model's lock."""

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import CheckpointError, JobError
from lowmem_gblm.storage.checkpoint.file_access import MARKER_FILE, RECORD
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.disk_errors import resume_command
from lowmem_gblm.storage.in_place_marker import check_complete, is_about, remove_marker
from lowmem_gblm.storage.journal import has_steps
from lowmem_gblm.storage.locking import MARK, OwnedFolder, model_lock
from lowmem_gblm.storage.pending_folder import check_absent, partial_folder

DESCRIPTION = "job.json"
_SHA256, _HASH_DIGITS = re.compile("[0-9a-f]{64}"), 8
# What is another when a job was moved or copied.
PLACES = ("folder", "output", "request")
DESCRIBED = {"id", "identity", "choices", *PLACES}


def job_to_resume(
    model: Path, output: Path, work_folder: Path, *, in_place: bool
) -> dict[str, Any] | None:
    """Return the description of the job that a run will resume; None if it begins a new one.

    What is left of a job that has finished is cleared away. Raises `JobError` if the result
    exists, or if another job is overwriting the model.
    """
    forget_finished(output, work_folder)
    found = read_description(work_folder)
    if not in_place:
        check_absent(output)
    elif os.path.lexists(output / RECORD):
        raise JobError(
            f"{output} was pruned already: it has a {RECORD}. To prune once more what is there "
            f"now, move that file away"
        )
    own = found is not None and found["identity"]["in_place"] and is_about(model, found["id"])
    if not (own and in_place):
        # Only the job that overwrites a model may read it.
        check_complete(model)
    return found if has_steps(work_folder) else None


def read_description(folder: Path) -> dict[str, Any] | None:
    """Return the description of the job in a work folder, or None; raise `JobError` if damaged."""
    path = folder / DESCRIPTION
    if not (folder / MARK).is_file() or not path.is_file():
        return None
    start_over = (
        f"to start over, remove {folder}, unless a model was being pruned in place: its "
        f"{MARKER_FILE} says what can be done then"
    )
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise JobError(f"{error}. Look at the disk; {start_over}") from None
    if not found.keys() >= DESCRIBED:
        raise JobError(
            f"{path} is that of another version of lowmem-gblm: finish it with that; {start_over}"
        )
    return found


def forget_finished(output: Path, folder: Path) -> None:
    """Remove what is left of a job that was killed after its output was complete."""
    if not (output / RECORD).is_file() or partial_folder(output).exists():
        return
    found = read_description(folder)
    if found is None:
        # A folder that is ours, but holds no job any more.
        if (folder / MARK).is_file():
            with suppress(JobError):
                OwnedFolder(folder).remove()
    elif read_json(output / RECORD).get("job") == found["id"]:
        own = OwnedFolder(folder)
        remove_marker(output)
        (output / MARK).unlink(missing_ok=True)
        own.remove()


def remove_finished(output: Path, job: str) -> None:
    """Remove the output of a job, or what an earlier attempt to remove it has left.

    Raises `JobError` if something else is there, or if another process uses it.
    """
    if not output.is_dir():
        return
    with model_lock(output, alone=True):
        files = [path for path in output.iterdir() if path.name != RECORD]
        if (output / RECORD).is_file():
            if read_json(output / RECORD).get("job") != job:
                raise JobError(f"{output} is not what was pruned there: move it away")
        elif files:
            raise JobError(f"{output} has no {RECORD}, so it is not removed: move it away")
        for path in files:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        # The record goes last: it says whose the other files are.
        (output / RECORD).unlink(missing_ok=True)
        output.rmdir()


def how_to_start_over(folder: Path, in_place: bool) -> str:
    """Return how to start over, for a message."""
    if in_place:
        return f"{MARKER_FILE} in the model says whether it can still be given up"
    return f"to start over, remove {folder}"


def check_same_job(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `JobError`, naming every difference, if two identities are not the same."""
    found = differences(old, new)
    if not found:
        return
    what_to_do = ", or add --accept-other-rounding" if found.keys() == {"device"} else ""
    raise JobError(
        f"{folder} holds a job that was begun otherwise ({'; '.join(found.values())}). To resume "
        f"it, ask for what it was begun with ({resume_command(folder)}){what_to_do}; "
        f"{how_to_start_over(folder, old['in_place'])}"
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs in two identities: its name, old and new value, by name."""
    return {
        name: _difference(name, old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if not _alike(old.get(name), new.get(name))
    }


def _alike(old: Any, new: Any) -> bool:
    """Return whether two values are the same; of globs the order counts."""
    ordered = isinstance(old, dict) and isinstance(new, dict)
    return bool(old == new) and (not ordered or list(old) == list(new))


def _difference(name: str, old: Any, new: Any) -> str:
    """Return old and new value; of hashes of blocks, which blocks."""
    if name == "source_blocks" and old and new:
        pairs = enumerate(zip(old, new, strict=False))
        others = [str(index) for index, (one, other) in pairs if one != other]
        return f"{name}: other in {', '.join(others)}"
    return f"{name}: {_brief(old)}, now {_brief(new)}"


def _brief(value: Any) -> str:
    """Return a value for a message; of a SHA-256 its beginning."""
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return f"{value[:_HASH_DIGITS]}…"
    return repr(value)
