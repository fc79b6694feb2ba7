"""An option: one field of a dataclass, with its help, its default and its meaning.

A field declared with `option` is an option of the command line, of the Python API and of the record
of a run.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any

from lowmem_gblm.errors import RequestError

_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(text: str) -> int:
    """Return the bytes of "22GiB", "24g" or "800MB" (KiB and K are 1024 bytes, KB is 1000)."""
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
        parse: Turns the typed string into the value; `bool` makes a flag without a value.
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


def check_choices(request: object) -> None:
    """Raise `RequestError` for a value that is not among the choices of its field."""
    for one in options(type(request)):
        value, choices = getattr(request, one.name), one.metadata["choices"]
        if choices and value not in choices:
            raise RequestError(
                f"{flag_of(one.name)} must be one of {', '.join(choices)}; got {value!r}"
            )


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of what has none."""


def flag_of(name: str) -> str:
    """Return what is typed for an option: "--gradient-norm" for "gradient_norm"."""
    return f"--{name.replace('_', '-')}"
