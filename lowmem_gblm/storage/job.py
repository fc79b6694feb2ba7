"""A job that can be interrupted at any instant: its identity, and a journal of what is done.

    OUTPUT.work/
        job.json            what identifies the job, how to type it again, what was chosen
        journal/000000.json one file per finished step: pass, records, what waits in which file
        dense-3, …          what waits between passes (`tensor_store`)

Every file appears whole or not at all (`atomic`), so after a crash the journal ends with the last
step of which everything is on the disk. A resumed job goes on with the next one.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from lowmem_gblm.errors import CheckpointError, JobError, RequestError
from lowmem_gblm.storage.atomic import flush_folder, publish_json, replace_json
from lowmem_gblm.storage.checkpoint.file_access import MARKER_FILE, RECORD
from lowmem_gblm.storage.checkpoint.reader import read_json
from lowmem_gblm.storage.checkpoint.writer import partial_folder
from lowmem_gblm.storage.in_place_marker import is_about
from lowmem_gblm.storage.locking import MARK, OwnedFolder, owner_of

_DESCRIPTION = "job.json"
_JOURNAL = "journal"
# What is another when a job was moved or copied.
_PLACES = ("folder", "output", "request")
_DESCRIBED = {"id", "identity", "choices", *_PLACES}


def read_description(folder: Path) -> dict[str, Any] | None:
    """What the job in a work folder is; None where none was begun.

    Raises:
        JobError: The description cannot be read.
    """
    path = folder / _DESCRIPTION
    if not (folder / MARK).is_file() or not path.is_file():
        return None
    anew = (
        f"to begin anew, remove {folder}, unless a model was being pruned in place: its "
        f"{MARKER_FILE} says what can be done then"
    )
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise JobError(f"{error}. Look at the disk; {anew}") from None
    if not found.keys() >= _DESCRIBED:
        raise JobError(
            f"{path} is that of another version of lowmem-gblm: finish it with that; {anew}"
        )
    return found


def forget_finished(output: Path, folder: Path) -> None:
    """Remove what is left of a job that was killed after its output was whole."""
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
        (output / MARKER_FILE).unlink(missing_ok=True)
        (output / MARK).unlink(missing_ok=True)
        own.remove()


def is_overwriting(model: Path, folder: Path) -> bool:
    """Whether the job in a work folder prunes this model in place.

    Raises:
        JobError: Its description cannot be read.
    """
    found = read_description(folder)
    if found is None or not found["identity"]["in_place"]:
        return False
    return is_about(model, found["id"])


def check_partial(output: Path, job: Job) -> None:
    """Raise `JobError` if what was written of an output belongs to a job in another folder."""
    number, _, name = owner_of(partial_folder(output)).partition(" ")
    folder = Path(name)
    if number in ("", job.id) or folder == job.folder.absolute() or not has_steps(folder):
        return
    if (read_description(folder) or {}).get("id") != number:
        return
    raise JobError(
        f"{partial_folder(output)} belongs to the job in {folder}: go on with that "
        f"({_resume(folder)}); to begin anew, remove both"
    )


def has_steps(folder: Path) -> bool:
    """Whether the job in a work folder has finished a step: else there is nothing to go on with."""
    return any((folder / _JOURNAL).glob("*.json"))


class Job:
    """The work folder of one run.

    Args:
        folder: Made if it is not there.
        description: Of this run: `identity`, which must be that of the job found there; its
            `folder`, `output` and `request`; and what else there is to be kept.
        expected: The description that was found there when this run was planned.

    Attributes:
        entries: Of the journal, oldest first.
        attempts: This one's number: one more than the last that has finished a step.

    Raises:
        JobError: Another job is there, another process is using it, or has since it was planned.
        RequestError: The folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        try:
            self._own = OwnedFolder(folder)
        except PermissionError as error:
            raise RequestError(
                f"{folder} cannot be made ({error.strerror}): give another place with --work-dir"
            ) from None
        try:
            self._description = self._found_or_begun(description, expected)
            self.entries = read_journal(folder, in_place=self._in_place)
            self.attempts = 1 + max((entry["attempt"] for entry in self.entries), default=0)
        except BaseException:
            if (folder / _DESCRIPTION).is_file():
                self._own.close()
            else:
                self._own.remove()
            raise

    @property
    def id(self) -> str:
        """What tells this job from any other."""
        found: str = self._description["id"]
        return found

    @property
    def owner(self) -> str:
        """What the mark of a folder says that belongs to this job."""
        return f"{self.id} {self.folder.absolute()}"

    @property
    def anew(self) -> str:
        """How to begin anew, if this job cannot be gone on with."""
        return _anew(self.folder, self._in_place)

    @property
    def _in_place(self) -> bool:
        found: bool = self._description["identity"]["in_place"]
        return found

    @property
    def resumed(self) -> bool:
        """Whether something has been done already."""
        return bool(self.entries)

    def done(self, name: str) -> list[dict[str, Any]]:
        """The finished steps of a pass."""
        return [entry for entry in self.entries if entry["pass"] == name]

    def waiting(self) -> dict[str, Any]:
        """What waits in the spill, by name, as `TensorStore.adopt` takes it."""
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

    def _found_or_begun(
        self, description: Mapping[str, Any], expected: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The description of the job that is gone on with; or of a new one, written down."""
        earlier = read_description(self.folder)
        found = earlier if has_steps(self.folder) else None
        if found != expected:
            raise JobError(
                f"another process has worked in {self.folder} meanwhile: give the same command "
                f"again"
            )
        if found is None:
            # A marker may speak of the job that was begun before, and has come to nothing.
            begun = {**description, "id": earlier["id"] if earlier else token_hex(8)}
            self._begin(begun)
            return begun
        check_same_job(self.folder, found["identity"], description["identity"])
        here = {name: description[name] for name in _PLACES}
        if found["folder"] == here["folder"]:
            self._check_output(found, here["output"])
        self._own.remove_temporary()
        if any(found[name] != here[name] for name in ("folder", "output")):
            found |= here
            replace_json(self.folder / _DESCRIPTION, found)
        return found

    def _check_output(self, found: Mapping[str, Any], output: str) -> None:
        """Raise `JobError` if this is the job of another output that is still there."""
        former = Path(found["output"])
        written = owner_of(partial_folder(former)).startswith(found["id"])
        if former.resolve() != Path(output) and (written or is_about(former, found["id"])):
            raise JobError(
                f"{self.folder} holds the job of {former}: give another --work-dir, or finish that "
                f"one first ({_resume(self.folder)})"
            )

    def _begin(self, description: Mapping[str, Any]) -> None:
        self._own.empty(but=[_DESCRIPTION])
        (self.folder / _JOURNAL).mkdir()
        flush_folder(self.folder)
        replace_json(self.folder / _DESCRIPTION, description)


def read_journal(folder: Path, *, in_place: bool) -> list[dict[str, Any]]:
    """The entries of the journal in a work folder, oldest first.

    Args:
        folder: The work folder.
        in_place: Whether its job overwrites a model, for the message.

    Raises:
        JobError: One is missing or damaged.
    """
    last = max((path.stem for path in (folder / _JOURNAL).glob("*.json")), default="-1")
    paths = [_entry_path(folder, number) for number in range(int(last) + 1)]
    try:
        return [read_json(path) for path in paths]
    except CheckpointError as error:
        raise JobError(f"{error}. Look at the disk; {_anew(folder, in_place)}") from None


def _entry_path(folder: Path, number: int) -> Path:
    return folder / _JOURNAL / f"{number:06}.json"


def _anew(folder: Path, in_place: bool) -> str:
    """How to begin anew."""
    if in_place:
        return f"{MARKER_FILE} in the model says whether it can still be given up"
    return f"to begin anew, remove {folder}"


def check_same_job(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `JobError`, naming every difference, if two identities are not the same."""
    found = differences(old, new)
    if not found:
        return
    way_out = ", or add --accept-other-rounding" if found.keys() == {"device"} else ""
    raise JobError(
        f"{folder} holds a job that was begun otherwise ({'; '.join(found.values())}). To go on "
        f"with it, ask for what it was begun with ({_resume(folder)}){way_out}; "
        f"{_anew(folder, old['in_place'])}"
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What is another in two identities: its name, old and new value, by name."""
    return {
        name: _difference(name, old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _difference(name: str, old: Any, new: Any) -> str:
    """Old and new value; of hashes of blocks, which blocks."""
    if name == "source_blocks" and old and new:
        others = [
            str(index)
            for index, (one, other) in enumerate(zip(old, new, strict=False))
            if one != other
        ]
        return f"{name}: other in {', '.join(others)}"
    return f"{name}: {old!r}, now {new!r}"


def _resume(folder: Path) -> str:
    """What to type to go on with a job."""
    return shlex.join(["lowmem-gblm", "resume", str(folder)])
