"""Extensions of this package in other packages, found by entry points (`importlib.metadata`).

Reading an entry point imports nothing; a package is imported when its extension is asked for.
"""

from importlib import metadata
from typing import Any

from lowmem_gblm.errors import RequestError


def extension_names(group: str) -> list[str]:
    """Return the names that other packages give in a group, without importing any package."""
    return sorted({point.name for point in metadata.entry_points(group=group)})


def load_extension(group: str, name: str, kind: str) -> Any:
    """Return what another package gives under a name; None if no package does.

    Raises:
        RequestError: The package cannot be imported, or does not have what it names.
    """
    for point in metadata.entry_points(group=group, name=name):
        try:
            return point.load()
        # The code of another package may raise anything.
        except Exception as error:
            raise RequestError(
                f"the {kind} {name!r} of the package {package_of(group, name)} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
    return None


def package_of(group: str, name: str) -> str:
    """Return the package that gives a name."""
    for point in metadata.entry_points(group=group, name=name):
        return point.value if point.dist is None else point.dist.name
    return "lowmem-gblm"
