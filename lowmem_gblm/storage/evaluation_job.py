"""The work folder of an evaluation, which the same evaluation finds again after an interruption.

    /var/tmp/lowmem-gblm-0123456789abcdef/    named by the SHA-256 of what is evaluated
        evaluation.json     the model, and what a resumed evaluation keeps to
        journal/000000.json one file per finished step
        dense-3, …          hidden states between blocks (`tensor_store`)

What is finished is what the journal says (`journal`).
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from lowmem_gblm.errors import JobError
from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.storage.atomic import flush_folder, publish_json
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.journal import JOURNAL, Journal, has_steps
from lowmem_gblm.storage.locking import MARK, OwnedFolder, owner_of, size_on_disk

_DESCRIPTION = "evaluation.json"
_PREFIX = "lowmem-gblm-"
_OWNER = "eval"
_NAME_DIGITS = 16
# Of one evaluation at the same time.
_MOST = 20
_log = logging.getLogger(__name__)


class EvaluationJob(Journal):
    """The work folder of one evaluation, created if it does not exist.

    Args:
        parent: The folder that it lies in.
        identity: Everything that, if it were different, would give another result.

    Attributes:
        kept: What an earlier attempt has begun with; None if it has finished no step.
    """

    def __init__(self, parent: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        name = f"{_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]}"
        self._own = _first_unused(parent, name)
        try:
            folder = self._own.path
            super().__init__(folder, f"to start over, remove {folder}")
            self.kept: dict[str, Any] | None = None
            if self.entries:
                self.kept = read_json(folder / _DESCRIPTION)
                self._own.remove_temporary()
                self.clean([MARK, _DESCRIPTION])
        except BaseException:
            self._own.close()
            raise

    def begin(self, model: str, chosen: Mapping[str, Any]) -> None:
        """Write down what a resumed evaluation keeps to, unless this one is resumed."""
        if self.entries:
            return
        self._own.empty()
        (self.folder / JOURNAL).mkdir()
        flush_folder(self.folder)
        path = self.folder / _DESCRIPTION
        publish_json(path, {"model": model, **chosen}, "the description of the evaluation")

    def discard_steps(self) -> None:
        """Discard what is done, for the evaluation to begin in another way."""
        if self.entries:
            # In one operation: a job with a part of its journal would be a damaged one.
            (self.folder / JOURNAL).rename(self.folder / f"{JOURNAL}-discarded")
        self.entries.clear()
        self.kept = None

    def close(self) -> None:
        """Keep what is done, for another process to resume it; remove a folder without any."""
        if self.entries:
            self._own.close()
        else:
            self._own.remove()

    def remove(self) -> None:
        """Remove the folder of the evaluation, which is over."""
        self._own.remove()


def clear_away(parent: Path) -> None:
    """Remove what killed evaluations of this user have left; tell of those that can be resumed.

    Hidden states may take gigabytes. Evaluations that other processes are at stay.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        # Jobs may have folders of like names, and a folder may be about to be marked: both stay.
        with suppress(OSError, JobError):
            if not _is_own(folder) or owner_of(folder) != _OWNER:
                continue
            own = OwnedFolder(folder, _OWNER)
            if has_steps(folder):
                own.close()
                _tell(folder)
            else:
                own.remove()


def _first_unused(parent: Path, name: str) -> OwnedFolder:
    """Return the first folder of an evaluation that no other process, and no other user, uses."""
    parent.mkdir(parents=True, exist_ok=True)
    for one in [name, *(f"{name}-{number}" for number in range(2, _MOST + 1))]:
        own = _take(parent / one)
        if own is not None:
            return own
    raise JobError(
        f"all of {_MOST} folders for this evaluation are in use: {parent / name} and others. Give "
        f"another place with --work-dir"
    )


def _take(folder: Path) -> OwnedFolder | None:
    """Return a folder for this process alone; None if it is in use, or not this user's own."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if _is_own(folder):
        with suppress(JobError):
            return OwnedFolder(folder, _OWNER)
    return None


def _is_own(folder: Path) -> bool:
    """Return whether a folder is this user's: anyone may make one in /var/tmp, or a link."""
    found = folder.lstat()
    return S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


@cache
def _tell(folder: Path) -> None:
    """Tell, once a process, of an interrupted evaluation."""
    model = read_json(folder / _DESCRIPTION).get("model")
    _log.info(
        f"note: {folder} ({gibibytes(size_on_disk(folder))}) has what is done of an interrupted "
        f"evaluation of {model}: the same command resumes it; to discard it, remove that folder"
    )
