"""The fields of a request as flags of the command line, and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import method_names
from lowmem_gblm.planning.resources import options


def add_options(
    command: argparse.ArgumentParser,
    kind: type[Any],
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> None:
    """Add a flag to a command for every field that is an option.

    Args:
        command: Parser of the command.
        kind: Class of the request.
        without: Fields that keep their default.
        only: Fields that get a flag; None for all.
    """
    for one in options(kind):
        if only is not None and one.name not in only:
            continue
        if one.name in without:
            command.set_defaults(**{one.name: one.default})
            continue
        described = one.metadata
        flag = f"--{one.name.replace('_', '-')}"
        if described["parse"] is bool:
            command.add_argument(flag, action="store_true", help=described["help"])
            continue
        shown = "" if one.default in (None, ()) else " [%(default)s]"
        help = described["help"]
        if one.name == "method":
            help = f"one of {', '.join(method_names())}"
        command.add_argument(
            flag,
            default=None if described["repeat"] else one.default,
            type=_typed(described["parse"]),
            choices=described["choices"] or None,
            metavar=None if described["choices"] else described["metavar"],
            action="append" if described["repeat"] else "store",
            help=help + shown,
        )


def request_from(kind: type[Any], arguments: argparse.Namespace, **more: Any) -> Any:
    """Return the request that was typed; `more` are fields that no flag gives."""
    values = {one.name: getattr(arguments, one.name) for one in options(kind)}
    repeated = {one.name for one in options(kind) if one.metadata["repeat"]}
    values |= {name: tuple(values[name] or ()) for name in repeated}
    return kind(model=arguments.model, **values, **more)


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser whose `RequestError` becomes argparse's own."""

    def typed(text: str) -> Any:
        try:
            return parse(text)
        except RequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    typed.__name__ = getattr(parse, "__name__", "value")
    return typed
