"""Upload of an output to the Hub: what it is made of, after a proof that it keeps its promises."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.card import show_results
from lowmem_gblm.commands.pruned_record import read_record
from lowmem_gblm.commands.report.outputs import EVALUATIONS
from lowmem_gblm.commands.verify import verify
from lowmem_gblm.errors import RequestError, UploadError, first_line, shown
from lowmem_gblm.runtime.activity import activity
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.checkpoint.file_access import RECORD, is_weights, side_files
from lowmem_gblm.storage.checkpoint.reader import INDEX, Checkpoint


def upload(
    output: str,
    repo: str,
    against: str | None = None,
    listener: Listener | None = None,
    *,
    public: bool = False,
) -> dict[str, Any]:
    """Verify an output, and upload it to a repository of the Hub, which is made if need be.

    Weights that are not loaded from, evaluations and caches stay here. What an interrupted upload
    has sent is not sent again. `listener` hears of the verification.

    Raises:
        RequestError: The output, the name of the repository or the token is missing or wrong.
        VerificationError: The output does not keep its promises.
        UploadError: The Hub cannot be reached or refuses, or has other weights there.
    """
    from huggingface_hub import HfApi

    if not Path(output).is_dir():
        raise RequestError(f"there is no folder {output} to upload: give one that prune has made")
    _check_access(repo)
    proof = verify(output, against, listener)
    folder = Path(output)
    show_results(folder, read_record(folder))
    names = sorted(_names(folder))
    api = HfApi()
    with _told(repo), activity(f"uploading {len(names)} files to {repo}"):
        url = api.create_repo(repo, private=not public, exist_ok=True)
        _check_no_other_weights(repo, api.list_repo_files(repo), names)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[escape(name) for name in names],
            commit_message="Upload a model pruned by lowmem-gblm",
        )
    return {
        "output": output,
        "repo": repo,
        "url": str(url),
        "commit": commit.oid,
        "files": names,
        "verified": proof,
    }


def _check_access(repo: str) -> None:
    """Raise `RequestError` if a name cannot be that of a repository, or if there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(
            f"{shown(repo)} is no name of a repository: {first_line(error)}"
        ) from None
    if get_token() is None:
        raise RequestError(
            "uploading needs a token of the Hub that may write: hf auth login stores one, or set "
            "HF_TOKEN"
        )


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of the files that an output is made of."""
    yield RECORD
    if (folder / INDEX).exists():
        yield INDEX
    yield from {entry.file.name for entry in Checkpoint(folder).tensors.values()}
    for path in side_files(folder):
        if not path.match(EVALUATIONS):
            yield path.relative_to(folder).as_posix()


def _check_no_other_weights(repo: str, there: Iterable[str], names: Collection[str]) -> None:
    """Raise `UploadError` if a loader would find weights beside those that are uploaded."""
    others = [name for name in there if is_weights(name) and name not in names]
    if others:
        raise UploadError(
            f"{repo} has weights that are not of this output: {shown(others[0])} "
            f"({len(others)} such files). Give another name, or delete them there first"
        )


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Raise `UploadError` instead of what the Hub or the way to it raises."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are OSError and every error of the HTTP library, which is not always the same one.
    raised = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
    try:
        yield
    except raised as error:
        raise UploadError(
            f"the upload to {repo} has failed: {first_line(error)}. The same command resumes it, "
            f"and sends nothing twice"
        ) from error
