"""Extensions of this package in other packages, found by entry points (`importlib.metadata`).

Reading an entry point imports nothing; a package is imported when its extension is asked for.
"""

from collections.abc import Callable
from importlib import metadata
from typing import Any

from lowmem_gblm.errors import RequestError


def extension_names(group: str) -> list[str]:
    """Return the names that other packages give in a group, without importing any package."""
    return sorted({point.name for point in metadata.entry_points(group=group)})


def load_extension(
    group: str, name: str, kind: str, fits: Callable[[Any], bool], expected: str
) -> Any:
    """Return what another package gives under a name; None if no package does.

    What cannot be imported, does not fit or has another name raises a `RequestError`, which says
    what is `expected`.
    """
    for point in metadata.entry_points(group=group, name=name):
        package = point.value if point.dist is None else point.dist.name
        which = f"the {kind} {name!r} of the package {package}"
        try:
            found = point.load()
        # The code of another package may raise anything.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise RequestError(f"{which} cannot be loaded: {why}") from error
        if not fits(found) or found.name != name:
            raise RequestError(f"{which} is no {expected}: {found!r}")
        return found
    return None
