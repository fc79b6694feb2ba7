"""A folder that is written file by file, and has its name only when it is complete."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.atomic import publish_folder
from lowmem_gblm.storage.locking import OwnedFolder


class PendingFolder:
    """A folder `FINAL.partial` that appears as the folder `final` when it is published.

    Args:
        owner: The job, as `storage.job.check_partial` reads it from the mark.
        keep: Files that an earlier attempt has finished, each with its `bytes`; all other files it
            left are removed.
        option: The option that gives `final`, for the message if that exists.
    """

    def __init__(
        self,
        final: Path,
        owner: str,
        keep: Mapping[str, dict[str, Any]],
        option: str = "OUTPUT",
    ) -> None:
        check_absent(final, option)
        self.path = partial_folder(final)
        self._final = final
        self._own = OwnedFolder(self.path, owner)
        self._own.empty(but=keep)
        for name, finished in keep.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != finished["bytes"]:
                self._own.close()
                raise JobError(
                    f"{file} was written by an interrupted run and is missing or damaged: look at "
                    f"the disk; to start over, remove {self.path} and the work folder"
                )

    def publish(self) -> None:
        """Give the folder its name; nothing can be written any more."""
        publish_folder(self.path, self._final)
        self._own.release(self._final)

    def close(self, *, keep: bool) -> None:
        """Stop writing; an unpublished folder is kept for another attempt, or removed."""
        if self.path.exists() and not keep:
            self._own.remove()
        else:
            self._own.close()


def partial_folder(final: Path) -> Path:
    """Return the folder that an output is written to until it is complete."""
    return final.with_name(f"{final.name}.partial")


def check_absent(final: Path, option: str = "OUTPUT") -> None:
    """Raise `JobError` if the folder of an option exists: nothing is ever overwritten."""
    if os.path.lexists(final):
        raise JobError(f"{final} exists already: choose another {option}, or move it away")
