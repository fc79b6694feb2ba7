"""The place of a model: a folder, the embedded model, or the Hub; and whether the Hub is there."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from lowmem_gblm.embedded import EMBEDDED, embedded_file, is_embedded
from lowmem_gblm.errors import CheckpointError, first_line
from lowmem_gblm.runtime.activity import activity
from lowmem_gblm.storage.checkpoint.remote_code import PATTERN
from lowmem_gblm.storage.in_place_marker import check_complete

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_UNWANTED = ["consolidated*", "original/*"]
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
# What the folder of a model in a cache of the Hub begins with.
CACHED = "models--"
NO_ANSWER = "it does not answer, or HF_HUB_OFFLINE is set"
# For a connection, and for the answer; and for all, as to look up a name may take longer.
_PATIENCE_S = 2.0
_LONGEST_S = 4.0


def locate(
    model: str, *, weights: bool = True, code: bool = False, unfinished: bool = False
) -> Path:
    """Return the folder of a model: a folder, "demo", or a Hub id, which is downloaded.

    A download goes into the Hub's own cache, safetensors and side files only; with the Python
    `code` of the model if that is wanted; without `weights`, only config.json. Files that the cache
    has already are in the folder all the same. Only an `unfinished` model may be one that is being
    pruned in place.
    """
    if is_embedded(model):
        found = embedded_file("model")
    elif Path(model).is_dir():
        found = Path(model)
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
    return not Path(model).exists() and model != EMBEDDED and bool(_HUB_ID.fullmatch(model))


def hub_id(model: str) -> str | None:
    """Return the Hub id of a model: as given, or that of a folder in the Hub's cache; else None."""
    if is_on_hub(model):
        return model
    parts = [part for part in Path(model).resolve().parts if part.startswith(CACHED)]
    return parts[0].removeprefix(CACHED).replace("--", "/") if parts else None


def public_name(model: str) -> str:
    """Return what a model is called elsewhere: its Hub id, or else the name of its folder."""
    return hub_id(model) or Path(os.path.abspath(model)).name


def _download(model: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with activity(f"looking up {model} on the Hub"), offline_if_unreachable() as answers:
        try:
            return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=_UNWANTED))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = first_line(error) if answers else NO_ANSWER
            raise CheckpointError(
                f"there is no model folder {model}, and the Hub does not give it: {reason}. Give "
                f"the folder of a model, or its id on the Hub as owner/name"
            ) from None


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Run the body with whether the Hub answers; if not, libraries look into their caches alone.

    Otherwise they would try again for half a minute.
    """
    from huggingface_hub import constants

    asked = constants.HF_HUB_OFFLINE
    former = {one: one.HF_HUB_OFFLINE for one in _settings()}
    answers = not any(former.values()) and _answers(constants.ENDPOINT)
    try:
        for one in former:
            one.HF_HUB_OFFLINE = not answers
        yield answers
    finally:
        # A module that the body has imported has taken over what was set meanwhile.
        for one in _settings():
            one.HF_HUB_OFFLINE = former.get(one, asked)


def _settings() -> list[Any]:
    """Return the modules that have the setting: that of `datasets` only if it is imported."""
    from huggingface_hub import constants

    datasets = sys.modules.get("datasets")
    return [constants, *([] if datasets is None else [datasets.config])]


def _answers(address: str) -> bool:
    """Return whether an address answers within seconds, by way of a proxy if one is set."""
    from huggingface_hub import get_session

    answered = Event()

    def ask() -> None:
        # Whatever a library for HTTP raises, there is no answer.
        with suppress(Exception):
            get_session().head(address, timeout=_PATIENCE_S)
            answered.set()

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_LONGEST_S)
    return answered.is_set()
