"""Arguments that functions of the API have in common."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from lowmem_gblm.errors import RequestError, shown_value

if TYPE_CHECKING:
    from lowmem_gblm.runtime.progress import Listener

Place = str | PathLike[str]


def checked_listener(listener: Any) -> Listener | None:
    """Return a listener, or None; raise `RequestError` for what cannot be called."""
    if listener is not None and not callable(listener):
        raise RequestError(
            f"the listener must be a function of a Tick, as ProgressBar(); got "
            f"{shown_value(listener)}"
        )
    found: Listener | None = listener
    return found
