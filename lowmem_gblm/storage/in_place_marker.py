"""The file in a model folder that says: this model is being pruned in place.

It is there from before the first byte is overwritten until after the last one, so that a
folder with some blocks pruned and some not is not taken for a model.
"""

from pathlib import Path

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.atomic import publish_file
from lowmem_gblm.storage.checkpoint.file_access import MARKER_FILE, RECORD
from lowmem_gblm.storage.disk_errors import resume_command

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


def write_marker(model: Path, work_folder: Path, job: str, *, overwritten: bool) -> None:
    """Write the marker of a job, by its id: the model is unchanged, or partly `overwritten`."""
    path, work_folder = model / MARKER_FILE, work_folder.absolute()
    words = _PARTLY if overwritten else _INTACT
    command = resume_command(work_folder)
    text = words.format(command=command, work_folder=work_folder, job=job)
    if not path.is_file() or path.read_text() != text:
        publish_file(path, [text.encode()], replaces=True)


def remove_marker(model: Path) -> None:
    """Remove the marker: the model is complete, or unchanged."""
    (model / MARKER_FILE).unlink(missing_ok=True)


def is_about(model: Path, job: str) -> bool:
    """Return whether the marker in a model folder is that of a job."""
    path = model / MARKER_FILE
    return path.is_file() and f"Job {job}" in path.read_text(errors="replace").splitlines()


def check_complete(folder: Path) -> None:
    """Raise `JobError` if a model is being pruned in place; one with a record is finished."""
    if (folder / MARKER_FILE).exists() and not (folder / RECORD).exists():
        raise JobError(
            f"{folder} is being pruned in place, or was until that was interrupted: some of its "
            f"blocks may be pruned and others not. {folder / MARKER_FILE} says how to resume it"
        )
