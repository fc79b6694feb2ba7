"""The file in a model folder that says: this model is being pruned in place.

It is there from before the first byte is overwritten until after the last one, so that a
folder with some blocks pruned and some not is not taken for a model.
"""

import shlex
from pathlib import Path

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.atomic import replace_file
from lowmem_gblm.storage.checkpoint.file_access import MARKER_FILE, RECORD

_INTACT = """\
lowmem-gblm is pruning the model in this folder in place. Nothing has been overwritten yet.

If no process is pruning it any more, this resumes the run:

    {command}

To give up, remove this file and {work_folder}: the model is as it was.

Job {job}
"""
_PARTLY = """\
lowmem-gblm is pruning the model in this folder in place. Some of its blocks are pruned and some
are not: it is good for nothing before all of them are.

If no process is pruning it any more, this resumes the run:

    {command}

It needs {work_folder}; without that, the model has to be fetched anew from where it came from.
Both may be moved, if they stay side by side.

Job {job}
"""


class InPlaceMarker:
    """The marker of one job, by its id and work folder, in a model folder."""

    def __init__(self, model: Path, work_folder: Path, job: str) -> None:
        self._path = model / MARKER_FILE
        self._job = job
        self._work_folder = work_folder.absolute()

    def tell(self, *, overwritten: bool) -> None:
        """Write the marker: the model is unchanged, or partly `overwritten`."""
        command = shlex.join(["lowmem-gblm", "resume", str(self._work_folder)])
        words = _PARTLY if overwritten else _INTACT
        text = words.format(command=command, work_folder=self._work_folder, job=self._job)
        if self._path.is_file() and self._path.read_text() == text:
            return
        replace_file(self._path, text.encode())

    def remove(self) -> None:
        """Remove the marker."""
        self._path.unlink(missing_ok=True)


def is_about(model: Path, job: str) -> bool:
    """Return whether the marker in a model folder is that of a job."""
    path = model / MARKER_FILE
    return path.is_file() and f"Job {job}" in path.read_text(errors="replace").splitlines()


def is_unfinished(folder: Path) -> bool:
    """Return whether a model is being pruned in place; a model with a record is finished."""
    return (folder / MARKER_FILE).exists() and not (folder / RECORD).exists()


def check_complete(folder: Path) -> None:
    """Raise `JobError` if a model is being pruned in place and has not been finished."""
    if is_unfinished(folder):
        raise JobError(
            f"{folder} is being pruned in place, or was until that was interrupted: some of its "
            f"blocks may be pruned and others not. {folder / MARKER_FILE} says how to resume it"
        )
