"""The fields of a request as flags of the command line, and back."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from lowmem_gblm.cli.streams import tell
from lowmem_gblm.cli.usage import METHOD_OPTIONS, Parser, place_of
from lowmem_gblm.commands.recipe import KEYS, with_recipe
from lowmem_gblm.commands.request import PruneRequest, prune_request
from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import find_method, method_names, option_owners, usable_methods
from lowmem_gblm.options import flag_of, options, parse_several

_HELP = ("-h", "--help")
_RECIPE = (
    "options from a .yaml file or from the pruning.json of an output; those that are typed win"
)


def add_options(
    command: Parser,
    kind: type[Any],
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    several: bool = False,
    recipe: bool = False,
) -> None:
    """Add a flag for every option of a class, and for those of the `methods`, to a command.

    Their order is that of `usage.GROUPS`. Fields named in `without` get none; where `only` names
    some, no other field gets one. Options of the methods take `several` values, if asked. With a
    `recipe`, an option that it may have has no default: it is there if it was typed.
    """
    for one in sorted(options(kind), key=lambda one: place_of(one.name)):
        if one.name in without or (only is not None and one.name not in only):
            continue
        help = one.metadata["help"]
        if one.name in ("method", "methods"):
            help = f"{help}, of {', '.join(method_names())}"
        open_to_recipe = recipe and one.name in KEYS
        default = argparse.SUPPRESS if open_to_recipe else one.default
        _add(command.group_of(one.name), one, default=default, help=help)
    if recipe:
        group = command.group_of("recipe")
        group.add_argument("--recipe", metavar="FILE", type=Path, help=_RECIPE)
    if methods:
        _add_method_options(command, methods, several=several)


def _add_method_options(command: Parser, methods: Sequence[str], *, several: bool) -> None:
    """Give a command a flag for every option of these methods; the first of a name counts."""
    owners = option_owners(methods)
    command.set_defaults(method_options=tuple(owners))
    for name, having in owners.items():
        one = next(one for one in options(find_method(having[0]).options) if one.name == name)
        help = f"{', '.join(having)}: {one.metadata['help']}"
        # An option that is not given is not one that the method may lack.
        group = command.group(METHOD_OPTIONS)
        _add(group, one, default=argparse.SUPPRESS, help=help, several=several)


def methods_to_offer(argv: Sequence[str]) -> list[str]:
    """Return the methods whose options are flags: our own, and others that a user names.

    Others are imported when they are named, or for the help; those that cannot be used are left
    out.
    """
    if any(word in _HELP for word in argv):
        return usable_methods(report=tell)
    return usable_methods({part for word in argv for part in word.rpartition("=")[2].split(",")})


def method_options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of methods that were typed."""
    return {
        name: getattr(arguments, name)
        for name in getattr(arguments, "method_options", ())
        if hasattr(arguments, name)
    }


def _add(
    group: argparse._ActionsContainer,
    one: Field[Any],
    *,
    default: object,
    help: str,
    several: bool = False,
) -> None:
    """Add the flag of one option, which may take `several` values."""
    described = one.metadata
    if several or described["several"]:
        _add_several(group, one, default=default, help=help)
        return
    if described["parse"] is bool:
        group.add_argument(flag_of(one.name), action="store_true", default=default, help=help)
        return
    repeated = described["repeat"] and default is not argparse.SUPPRESS
    shown = "" if one.default in (None, ()) else f" [{one.default}]"
    group.add_argument(
        flag_of(one.name),
        default=[] if repeated else default,
        type=_typed(described["parse"]),
        choices=described["choices"] or None,
        metavar=None if described["choices"] else described["metavar"],
        action="append" if described["repeat"] else "store",
        help=help + shown,
    )


def _add_several(
    group: argparse._ActionsContainer, one: Field[Any], *, default: object, help: str
) -> None:
    """Add the flag of an option that takes several values, with commas."""
    parse, choices = one.metadata["parse"], one.metadata["choices"]
    among = f" ({', '.join(choices)})" if choices else ""
    values = one.default if isinstance(one.default, tuple) else (one.default,)
    shown = f" [{','.join(map(str, values))}]" if values else ""
    group.add_argument(
        flag_of(one.name),
        default=default,
        type=_typed(parse, several=True),
        metavar="A,B,…",
        help=f"{help}{among}{shown}",
    )


def request_from(kind: type[Any], arguments: argparse.Namespace, **more: Any) -> Any:
    """Return the request that was typed; `more` are fields that no flag gives."""
    values = _typed_values(kind, arguments)
    if "method_options" in {one.name for one in fields(kind)}:
        values["method_options"] = method_options_of(arguments)
    return kind(model=arguments.model, **values | more)


def prune_request_from(arguments: argparse.Namespace, output: Path | None = None) -> PruneRequest:
    """Return the request that was typed for a command that takes a recipe."""
    typed = _typed_values(PruneRequest, arguments) | method_options_of(arguments)
    return prune_request(arguments.model, output, **with_recipe(arguments.recipe, typed))


def _typed_values(kind: type[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a class that were typed, or have a default of the command line."""
    names = [one.name for one in options(kind) if hasattr(arguments, one.name)]
    return {name: getattr(arguments, name) for name in names}


def _typed(parse: Callable[[str], Any], *, several: bool = False) -> Callable[[str], Any]:
    """Return a parser of one value, or several, whose `RequestError` becomes argparse's own."""

    def typed(text: str) -> Any:
        try:
            return parse_several(text, parse) if several else parse(text)
        except RequestError as error:
            # argparse names the option itself.
            option, _, said = str(error).partition(" ")
            text = said if option.startswith("--") else str(error)
            raise argparse.ArgumentTypeError(text) from None

    typed.__name__ = getattr(parse, "__name__", "value")
    return typed
