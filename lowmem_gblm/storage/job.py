"""A prune that can be interrupted at any instant: its identity, and a journal of finished steps.

    OUTPUT.work/
        job.json            what identifies the job, how to type it again, what was chosen
        samples.safetensors the calibration samples, if no name of a text leads to them again
        journal/000000.json one file per finished step: pass, records, what is stored in which file
        dense-3, …          what is stored between passes (`tensor_store`)

What is finished is what the journal says (`journal`).
"""

from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.storage import job_state
from lowmem_gblm.storage.atomic import flush_folder, publish_json
from lowmem_gblm.storage.disk_errors import resume_command
from lowmem_gblm.storage.in_place_marker import is_about
from lowmem_gblm.storage.journal import JOURNAL, Journal, has_steps
from lowmem_gblm.storage.kept_samples import SAMPLES
from lowmem_gblm.storage.locking import MARK, OwnedFolder, owner_of
from lowmem_gblm.storage.pending_folder import partial_folder


class Job(Journal):
    """The work folder of one run, created if it does not exist.

    Args:
        description: Of this run: `identity`, which must be that of the job found there; its
            `folder`, `output` and `request`; and whatever else is to be kept.
        expected: The description that was found there when this run was planned.

    Attributes:
        owner: The mark of a folder that belongs to this job.
    """

    def __init__(
        self, folder: Path, description: Mapping[str, Any], expected: Mapping[str, Any] | None
    ) -> None:
        self.folder = folder
        try:
            self._own = OwnedFolder(folder)
        except PermissionError as error:
            raise RequestError(
                f"{folder} cannot be made ({error.strerror}): give another place with --work-dir"
            ) from None
        try:
            found = self._found_or_begun(description, expected)
            in_place = found["identity"]["in_place"]
            self.id: str = found["id"]
            self.owner = f"{self.id} {folder.absolute()}"
            super().__init__(folder, job_state.how_to_start_over(folder, in_place))
        except BaseException:
            if (folder / job_state.DESCRIPTION).is_file():
                self._own.close()
            else:
                self._own.remove()
            raise

    def remove_unlisted(self) -> None:
        """Remove what an earlier process has written and not written down."""
        self.clean([MARK, job_state.DESCRIPTION, SAMPLES])

    def close(self) -> None:
        """Close the folder and keep all files, so that another process can resume the job."""
        self._own.close()

    def forget(self) -> None:
        """Remove the description: nothing can be resumed any more."""
        (self.folder / job_state.DESCRIPTION).unlink(missing_ok=True)
        self.entries.clear()

    def remove(self) -> None:
        """Remove the folder of the job, which is over."""
        self._own.remove()

    def _found_or_begun(
        self, description: Mapping[str, Any], expected: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return the description of the job that is resumed; or of a new job, after writing it."""
        earlier = job_state.read_description(self.folder)
        found = earlier if has_steps(self.folder) else None
        if found != expected:
            raise JobError(
                f"another process has worked in {self.folder} meanwhile: give the same command "
                f"again"
            )
        if found is None:
            # The marker of an earlier job that has finished no step may name its id.
            begun = {**description, "id": earlier["id"] if earlier else token_hex(8)}
            self._own.empty(but=[job_state.DESCRIPTION])
            (self.folder / JOURNAL).mkdir()
            flush_folder(self.folder)
            self._describe(begun)
            return begun
        job_state.check_same_job(self.folder, found["identity"], description["identity"])
        here = {name: description[name] for name in job_state.PLACES}
        if found["folder"] == here["folder"]:
            self._check_output(found, here["output"])
        self._own.remove_temporary()
        if any(found[name] != here[name] for name in ("folder", "output")):
            found |= here
            self._describe(found)
        return found

    def _check_output(self, found: Mapping[str, Any], output: str) -> None:
        """Raise `JobError` if this is the job of another output that is still there."""
        former = Path(found["output"])
        written = owner_of(partial_folder(former)).startswith(found["id"])
        if former.resolve() != Path(output) and (written or is_about(former, found["id"])):
            raise JobError(
                f"{self.folder} holds the job of {former}: give another --work-dir, or finish that "
                f"job first ({resume_command(self.folder)})"
            )

    def _describe(self, description: Mapping[str, Any]) -> None:
        path = self.folder / job_state.DESCRIPTION
        publish_json(path, description, "the description of the job", replaces=True)


def check_partial(output: Path, job: Job) -> None:
    """Raise `JobError` if the partial output belongs to a job in another folder."""
    number, _, name = owner_of(partial_folder(output)).partition(" ")
    folder = Path(name)
    if number in ("", job.id) or folder == job.folder.absolute() or not has_steps(folder):
        return
    if (job_state.read_description(folder) or {}).get("id") == number:
        raise JobError(
            f"{partial_folder(output)} belongs to the job in {folder}: resume that job "
            f"({resume_command(folder)}); to start over, remove both"
        )
