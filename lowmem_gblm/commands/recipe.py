"""Recipes: what makes an output what it is, in a YAML file or in the record of a run.

The keys are the names of options, with underscores; a value means what it means when it is typed.
A recipe says nothing of the model, of places and budgets, nor whether foreign code may run: those
are for the command line, whose options win.
"""

from collections.abc import Mapping
from dataclasses import Field
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.method_options import no_option
from lowmem_gblm.commands.pattern_rules import as_options
from lowmem_gblm.commands.recipe_file import read_recipe_file
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import RequestError, shown, shown_value
from lowmem_gblm.methods import find_method, option_owners, usable_methods
from lowmem_gblm.options import flag_of, options

# Of what identifies a job: where it is computed and written, and what is trusted.
_NO_KEYS = ("device", "in_place", "statistics_dtype", "trust_remote_code")
KEYS = {
    one.name: one
    for one in options(PruneRequest)
    if one.metadata["identity"] and one.name not in _NO_KEYS
}
_GOAL = {"sparsity", "pattern"}
_KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
_BOOLEANS = {"true": True, "false": False}


def recipe_of(request: PruneRequest, understood: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that makes an output again; a calibration file has no folder in it.

    `understood` is what the options of the request were understood to mean.
    """
    text = Path(request.calibration_text)
    found = {name: understood.get(name) for name in _keys(request.method) if name not in _GOAL}
    found["calibration"] = text.name if text.is_absolute() else request.calibration_text
    goal = {"method": found.pop("method"), **as_options(request.rules)}
    return goal | {name: value for name, value in found.items() if value not in (None, [])}


def with_recipe(recipe: str | PathLike[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are `given`, and those of a recipe that are not; None gives none.

    A sparsity or a pattern that is given stands for both. Options of the recipe's method that a
    given method lacks are left out.
    """
    if recipe is None:
        return dict(given)
    found = read_recipe(Path(recipe))
    given = {name: value for name, value in given.items() if value is not None}
    if _GOAL & given.keys():
        found = {name: value for name, value in found.items() if name not in _GOAL}
    if "method" in given:
        known = _keys(given["method"])
        found = {name: value for name, value in found.items() if name in known}
    return {**found, **given}


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the options in a recipe, parsed; raise `RequestError` for what is none."""
    content = read_recipe_file(path)
    method = _parsed(path, KEYS["method"], content.get("method", KEYS["method"].default))
    known = _keys(method)
    for name in content:
        if name not in known:
            raise _unknown(path, name, method)
    return {name: _parsed(path, known[name], value) for name, value in content.items()}


def _keys(method: str) -> dict[str, Field[Any]]:
    """Return the options that a recipe for a method may have, by name."""
    return KEYS | {one.name: one for one in options(find_method(method).options)}


def _unknown(path: Path, name: str, method: str) -> RequestError:
    """Return the error for a key that no recipe for this method has."""
    if name in option_owners(usable_methods()):
        return RequestError(f"{path}: {no_option(name, [method])}")
    if name in {one.name for one in options(PruneRequest)}:
        return RequestError(
            f"{path}: {name} is for the command line, as {flag_of(name)}: a recipe says what an "
            f"output is, not where or how it is made"
        )
    nearest = get_close_matches(name, _keys(method), 1, 0)[0]
    return RequestError(f"{path}: a recipe has no key {shown(name)}; the nearest is {nearest}")


def _parsed(path: Path, one: Field[Any], value: Any) -> Any:
    """Return the value of an option: what its text means when it is typed, or a number of JSON.

    Globs may have a value each.
    """
    if isinstance(value, dict) and one.name in _GOAL:
        return {glob: _single(path, one.name, each) for glob, each in value.items()}
    if isinstance(value, list) and one.metadata["repeat"]:
        return [_single(path, one.name, each) for each in value]
    found, parse = _single(path, one.name, value), one.metadata["parse"]
    try:
        if parse is bool:
            return _BOOLEANS[str(found).lower()]
        return parse(str(found)) if isinstance(found, str) or parse in _KINDS else found
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    except (ValueError, KeyError):
        kind = _KINDS.get(parse, "a value as it is typed")
        said = f"{path}: {one.name} must be {kind}; got {shown(repr(found))}"
        raise RequestError(said) from None


def _single(path: Path, name: str, value: Any) -> str | float:
    """Return a value that is a text or a number."""
    if value in (None, "") or not isinstance(value, str | float | int):
        raise RequestError(
            f"{path}: {name} cannot be {shown_value(value)}: give one value, or leave out the key"
        )
    return value
