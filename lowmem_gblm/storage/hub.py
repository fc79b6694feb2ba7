"""The place of a model: a folder, the embedded model, or the Hub."""

import re
from importlib import resources
from pathlib import Path

from lowmem_gblm.errors import CheckpointError
from lowmem_gblm.storage.checkpoint.remote_code import PATTERN
from lowmem_gblm.storage.in_place_marker import check_complete

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_UNWANTED = ["consolidated*", "original/*"]
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
_EMBEDDED = "demo"


def locate(
    model: str, *, weights: bool = True, code: bool = False, unfinished: bool = False
) -> Path:
    """Return the folder of a model; a model of the Hub is downloaded.

    Args:
        model: A folder; "demo" for the embedded model; or a Hub id, which is downloaded into the
            Hub's own cache (safetensors and side files only).
        weights: Whether the weights are wanted; otherwise only config.json of a Hub id is
            downloaded. Files that the cache has already are in the folder all the same.
        code: Whether Python code that comes with the model is wanted, too.
        unfinished: Whether the model may be one that is being pruned in place.

    Raises:
        CheckpointError: `model` is none of these.
        JobError: The model is being pruned in place, and that has not been finished.
    """
    if Path(model).is_dir():
        found = Path(model)
    elif model == _EMBEDDED:
        found = Path(str(resources.files("lowmem_gblm") / "demo" / "model"))
    elif is_on_hub(model):
        wanted = [*(_WANTED if weights else ["config.json"]), *([PATTERN] if code else [])]
        found = _download(model, wanted)
    else:
        raise CheckpointError(f"there is no model folder {model}")
    if not unfinished:
        check_complete(found)
    return found


def is_on_hub(model: str) -> bool:
    """Return whether `model` may be a Hub id: neither a folder nor the embedded model."""
    return not Path(model).exists() and model != _EMBEDDED and bool(_HUB_ID.fullmatch(model))


def _download(model: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no model folder {model}, and the Hub does not give it: {reason[0]}"
        ) from None
