"""Globs over the names of tensors on disk, and what a misspelt glob may have meant."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from lowmem_gblm.errors import RequestError, shown


def as_globs(name: str, value: Any) -> tuple[str, ...]:
    """Return the globs of the option `name`: one string is one glob, not its letters."""
    globs = (value,) if isinstance(value, str) else value
    collection = isinstance(globs, (tuple, list, set, frozenset))
    if not collection or not all(isinstance(glob, str) for glob in globs):
        raise RequestError(
            f"--{name} takes a glob, or a list of globs, over tensor names; got {value!r}"
        )
    return tuple(globs)


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a tensor of this name is to be pruned; without `include`, all are."""
    if include and not any(fnmatchcase(name, glob) for glob in include):
        return False
    return not any(fnmatchcase(name, glob) for glob in exclude)


def check_globs(option: str, globs: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raise `RequestError` that names each glob of an option that matches none of the names."""
    idle = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if idle:
        said = "; ".join(
            f"--{option} {shown(repr(glob))} matches no {what}, {_nearest(glob, names)}"
            for glob in idle
        )
        raise RequestError(f"{said}. Give globs over complete names, as '*.mlp.*'")


def _nearest(glob: str, names: Sequence[str]) -> str:
    found = list(map(shown, nearest_names(glob, names)))
    return f"the nearest {'is' if len(found) == 1 else 'are'} {', '.join(found)}"


def nearest_names(glob: str, names: Sequence[str], most: int = 3) -> list[str]:
    """Return the names that a misspelt glob may have meant, nearest first.

    Parts between dots are compared, because a glob is often one part of a name.
    """
    with_part: dict[str, str] = {}
    for name in names:
        for part in name.split("."):
            with_part.setdefault(part, name)
    literal = glob.strip("*?.[]").rpartition("*")[2]
    parts = [part for part in literal.split(".") if not part.isdigit()]
    close = [
        match for part in parts for match in get_close_matches(part, with_part, n=most, cutoff=0.5)
    ]
    found = [with_part[part] for part in close] or get_close_matches(glob, names, most, 0)
    return list(dict.fromkeys(found))[:most]
