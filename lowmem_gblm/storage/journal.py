"""The finished steps of a job, in its folder: one file a step, so that the job can be resumed.

Every file appears complete or not at all (`atomic`), so after a crash the journal ends with the
last step of which everything is on the disk. A resumed job begins with the step after it.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import CheckpointError, JobError
from lowmem_gblm.storage.atomic import publish_json
from lowmem_gblm.storage.checkpoint.strict_json import read_json

JOURNAL = "journal"


class Journal:
    """The journal of the job in a folder, which exists.

    Attributes:
        start_over: How to start over, if this job cannot be resumed.
        entries: Entries of the journal, oldest first.
        attempts: Number of this attempt: one more than the last that has finished a step.
    """

    def __init__(self, folder: Path, start_over: str) -> None:
        self.folder = folder
        self.start_over = start_over
        self.entries = read_journal(folder, start_over)
        self.attempts = 1 + max((entry["attempt"] for entry in self.entries), default=0)

    def stored(self) -> dict[str, Any]:
        """Return what is stored in the work folder, by name, as `TensorStore.adopt` takes it."""
        tables: dict[str, Any] = {}
        for entry in self.entries:
            tables |= entry["stored"]
            for name in entry["dropped"]:
                tables.pop(name, None)
        return tables

    def add(self, entry: dict[str, Any]) -> None:
        """Add to the journal that a step is done."""
        entry = entry | {"attempt": self.attempts}
        publish_json(_entry_path(self.folder, len(self.entries)), entry, "the journal")
        self.entries.append(entry)

    def clean(self, kept: Collection[str]) -> None:
        """Remove the files in the folder that no entry lists, but those of these names.

        An earlier process has written them, and not written down.
        """
        named = {*self.stored(), *kept}
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in named:
                path.unlink()


def has_steps(folder: Path) -> bool:
    """Return whether the job in a work folder has finished a step, and so can be resumed."""
    return any((folder / JOURNAL).glob("*.json"))


def read_journal(folder: Path, start_over: str) -> list[dict[str, Any]]:
    """Return the entries of the journal, oldest first; raise `JobError` if one is damaged."""
    last = max((path.stem for path in (folder / JOURNAL).glob("*.json")), default="-1")
    paths = [_entry_path(folder, number) for number in range(int(last) + 1)]
    try:
        return [read_json(path) for path in paths]
    except CheckpointError as error:
        raise JobError(f"{error}. Look at the disk; {start_over}") from None


def _entry_path(folder: Path, number: int) -> Path:
    return folder / JOURNAL / f"{number:06}.json"
