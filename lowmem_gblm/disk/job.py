"""A job that can be interrupted at any instant: its identity, and a journal of what is done.

    OUTPUT.work/
        job.json            what identifies the job, how to type it again, what was chosen
        journal/000000.json one file per finished step: pass, records, what waits in which file
        dense-3, …          what waits between passes (`spill`)

Every file appears whole or not at all (`publish`), so after a crash the journal ends with the last
step of which everything is on the disk. A resumed job goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lowmem_gblm.disk.checkpoint import read_json
from lowmem_gblm.disk.files import RECORD
from lowmem_gblm.disk.folder import MARK, OwnFolder
from lowmem_gblm.disk.notice import NOTICE
from lowmem_gblm.disk.output import partial_folder
from lowmem_gblm.disk.publish import publish_json
from lowmem_gblm.errors import CheckpointError, JobError

_DESCRIPTION = "job.json"
_JOURNAL = "journal"


def read_description(folder: Path) -> dict[str, Any] | None:
    """What the job in a work folder is; None where none was begun.

    Raises:
        JobError: The description cannot be read.
    """
    path = folder / _DESCRIPTION
    if not (folder / MARK).is_file() or not path.is_file():
        return None
    try:
        return read_json(path)
    except CheckpointError as error:
        raise JobError(
            f"{error}. Look at the disk; to begin anew, remove {folder}, unless a model was being "
            f"pruned in place: its {NOTICE} says what can be done then"
        ) from None


def forget_finished(output: Path, folder: Path) -> None:
    """Remove what is left of a job that was killed after its output was whole."""
    whole = (output / RECORD).is_file() and not partial_folder(output).exists()
    found = read_description(folder) if whole else None
    if found is not None and _overwritten(found) in (None, str(output.resolve())):
        (output / NOTICE).unlink(missing_ok=True)
        (output / MARK).unlink(missing_ok=True)
        OwnFolder(folder).remove()


def is_overwriting(model: Path, folder: Path) -> bool:
    """Whether the job in a work folder prunes this model in place.

    Raises:
        JobError: Its description cannot be read.
    """
    found = read_description(folder)
    return found is not None and _overwritten(found) == str(model.resolve())


def _overwritten(description: Mapping[str, Any]) -> str | None:
    """The model that a job prunes in place; None for one with an OUTPUT."""
    folder: str | None = description["identity"].get("overwritten")
    return folder


def has_steps(folder: Path) -> bool:
    """Whether the job in a work folder has finished a step: else there is nothing to go on with."""
    return any((folder / _JOURNAL).glob("*.json"))


class Job:
    """The work folder of one run.

    Args:
        folder: Made if it is not there.
        description: Of this run; `identity` in it must be that of the job found there.

    Attributes:
        entries: Of the journal, oldest first.
        attempts: This one's number: one more than the last that has finished a step.

    Raises:
        JobError: Another job is there, or another process is using it.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder = folder
        self._own = OwnFolder(folder)
        try:
            previous = read_description(folder)
            if previous is None or not has_steps(folder):
                self._begin(description)
            else:
                check_same_job(folder, previous["identity"], description["identity"])
                self._own.remove_temporary()
            self.entries = _read_journal(folder, description["identity"])
            self.attempts = 1 + max((entry["attempt"] for entry in self.entries), default=0)
        except BaseException:
            if (folder / _DESCRIPTION).is_file():
                self._own.close()
            else:
                self._own.remove()
            raise

    @property
    def resumed(self) -> bool:
        """Whether something has been done already."""
        return bool(self.entries)

    def done(self, name: str) -> list[dict[str, Any]]:
        """The finished steps of a pass."""
        return [entry for entry in self.entries if entry["pass"] == name]

    def waiting(self) -> dict[str, Any]:
        """What waits in the spill, by name, as `Spill.adopt` takes it."""
        tables: dict[str, Any] = {}
        for entry in self.entries:
            tables |= entry["waiting"]
            for name in entry["dropped"]:
                tables.pop(name, None)
        return tables

    def add(self, entry: dict[str, Any]) -> None:
        """Write down that a step is done.

        Raises:
            OSError: The disk is full or failing.
        """
        entry = entry | {"attempt": self.attempts}
        publish_json(_entry_path(self.folder, len(self.entries)), entry)
        self.entries.append(entry)

    def clean(self, waiting: Collection[str]) -> None:
        """Remove what an earlier process has written and not written down."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in (*waiting, MARK, _DESCRIPTION):
                path.unlink()

    def close(self) -> None:
        """Leave everything for another process to go on with."""
        self._own.close()

    def forget(self) -> None:
        """From now on there is nothing to go on with: its result has its place, or never will."""
        (self.folder / _DESCRIPTION).unlink(missing_ok=True)
        self.entries.clear()

    def remove(self) -> None:
        """The job is over: remove its folder."""
        self._own.remove()

    def _begin(self, description: Mapping[str, Any]) -> None:
        self._own.empty()
        (self.folder / _JOURNAL).mkdir()
        publish_json(self.folder / _DESCRIPTION, description)


def _read_journal(folder: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its entries, oldest first.

    Raises:
        JobError: One is missing or damaged.
    """
    last = max((path.stem for path in (folder / _JOURNAL).glob("*.json")), default="-1")
    paths = [_entry_path(folder, number) for number in range(int(last) + 1)]
    try:
        return [read_json(path) for path in paths]
    except CheckpointError as error:
        raise JobError(f"{error}. Look at the disk; {_anew(folder, identity)}") from None


def _entry_path(folder: Path, number: int) -> Path:
    return folder / _JOURNAL / f"{number:06}.json"


def _anew(folder: Path, identity: Mapping[str, Any]) -> str:
    """How to begin anew."""
    if identity.get("overwritten"):
        return f"{NOTICE} in the model says whether it can still be given up"
    return f"to begin anew, remove {folder}"


def check_same_job(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `JobError`, naming every difference, if two identities are not the same."""
    names = sorted({*old, *new})
    differing = [name for name in names if old.get(name) != new.get(name)]
    if not differing:
        return
    listed = "; ".join(f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in differing)
    rounding = differing == ["device"]
    way_out = ", or add --accept-other-rounding" if rounding else ""
    raise JobError(
        f"{folder} holds a job that was begun otherwise ({listed}). To go on with it, ask for what "
        f"it was begun with (lowmem-gblm resume {folder}){way_out}; {_anew(folder, old)}"
    )
