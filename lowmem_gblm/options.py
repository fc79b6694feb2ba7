"""An option: one field of a dataclass, with its help, its default and its meaning.

A field declared with `option` is an option of the command line, of the Python API and of the record
of a run.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import RequestError, shown_value

_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}

# In bytes, as file systems have it.
_LONGEST_PART = 255
# By what an option is parsed with: the types of its values in Python, and how they are called.
_KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    str: (str, "a text"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
    Path: ((str, PathLike), "a path"),
}


def parse_bytes(size: Any) -> int:
    """Return the bytes of "22GiB", "24g" or "800MB" (KiB and K are 1024 bytes, KB is 1000).

    An integer is a number of bytes.
    """
    text = f"{size}B" if isinstance(size, Integral) and not isinstance(size, bool) else size
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is not None and not match[2]:
        raise RequestError(f"a size needs a unit: {match[1]}GiB, {match[1]}MiB or {match[1]}B?")
    if match is None or match[2].lower() not in _UNITS:
        raise RequestError(f"a size reads like 22GiB or 800MB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names meant by "boolq, arc_easy", or by several such texts, each once."""
    texts = [names] if isinstance(names, str) else names
    parts = [part.strip() for text in texts for part in text.split(",")]
    return tuple(dict.fromkeys(filter(None, parts)))


def parse_several(values: Any, parse: Callable[[str], Any] = str) -> tuple[Any, ...]:
    """Return the values meant by "1, 10, 100", by one value, or by several of them."""
    parts = values if isinstance(values, (list, tuple)) else [values]
    return tuple(
        value
        for part in parts
        for value in (
            [parse(one.strip()) for one in part.split(",")] if isinstance(part, str) else [part]
        )
    )


def option(
    default: Any,
    help: str,
    *,
    identity: bool = True,
    choices: tuple[str, ...] = (),
    parse: type | Any = str,
    metavar: str | None = None,
    repeat: bool = False,
    several: bool = False,
) -> Any:
    """Declare a field of a request, or of the options of a method.

    Args:
        identity: Whether another value gives another result.
        parse: Turns the typed string, or what Python code gives, into the value; `bool` makes a
            flag without a value.
        repeat: Whether the option may be given several times.
        several: Whether the typed string may hold several values, with commas.
    """
    metadata = {
        "help": help, "identity": identity, "choices": choices, "parse": parse,
        "metavar": metavar, "repeat": repeat, "several": several,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def options(request_class: type[Any]) -> list[Field[Any]]:
    """Return the fields that were declared with `option`."""
    return [one for one in fields(request_class) if "help" in one.metadata]


def check_options(request: object) -> None:
    """Replace the options of a request by what they mean, each in its type.

    Raises `RequestError` for a value of another type, or that is not among the choices. Options
    that can be repeated are left as they are.
    """
    given = {one.name: getattr(request, one.name) for one in options(type(request))}
    for name, value in checked_options(type(request), given).items():
        object.__setattr__(request, name, value)


def checked_options(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are given for options of a class, as `check_options` says."""
    return {one.name: _checked(one, given[one.name]) for one in options(kind) if one.name in given}


def _checked(one: Field[Any], value: Any) -> Any:
    if one.metadata["repeat"] or (value is None and one.default is None):
        return value
    if one.metadata["several"]:
        return tuple(_checked_value(one, part) for part in parse_several(value))
    return _checked_value(one, value)


def _checked_value(one: Field[Any], value: Any) -> Any:
    parse, choices, flag = one.metadata["parse"], one.metadata["choices"], flag_of(one.name)
    types, what = _KINDS.get(parse, (object, ""))
    if not isinstance(value, types) or (isinstance(value, bool) and parse in (int, float)):
        raise RequestError(f"{flag} must be {what}; got {shown_value(value)}")
    try:
        found = Path(as_path(flag, value)) if parse is Path else parse(value)
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        raise RequestError(f"{flag} cannot be {shown_value(value)}") from None
    if choices and found not in choices:
        raise RequestError(f"{flag} must be one of {', '.join(choices)}; got {shown_value(value)}")
    return found


def as_path(what: str, value: Any) -> str:
    """Return a path, or a name, as text; raise `RequestError` for what can be none."""
    text = fspath(value) if isinstance(value, (str, PathLike)) else None
    if (
        not isinstance(text, str)
        or "\0" in text
        or any(len(part.encode(errors="replace")) > _LONGEST_PART for part in text.split("/"))
    ):
        raise RequestError(f"{what} must be a path; got {shown_value(value)}")
    return text


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of what has none."""


def flag_of(name: str) -> str:
    """Return what is typed for an option: "--gradient-norm" for "gradient_norm"."""
    return f"--{name.replace('_', '-')}"
