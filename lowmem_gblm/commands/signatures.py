"""Signatures and docstrings of the Python API, from what is declared of the options."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lowmem_gblm.methods import built_in_names, find_method, option_owners
from lowmem_gblm.options import options

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# What the names of types in the signatures stand for.
_TYPES = """
Types:
    Place: str or Path
    Size: an integer of bytes, or a text as "24GiB"
    Sparsity: a number, or a text as "0.5"
    Pattern: "2:4" or (2, 4)
    Calibration: str or Path, a list of texts, a list of tensors or one tensor of token ids, or a
        datasets.Dataset
"""
_LAYOUT: dict[str, Any] = {"width": 96, "initial_indent": " " * 4, "subsequent_indent": " " * 8}


def documented(
    *kinds: type[Any],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Append to a docstring what each parameter means that is an option of these classes."""
    meanings = _meanings(kinds)

    def document(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        named = [name for name in inspect.signature(function).parameters if name in meanings]
        lines = [textwrap.fill(f"{name}: {meanings[name]}", **_LAYOUT) for name in named]
        function.__doc__ = "\n".join([f"{inspect.getdoc(function)}\n\nOptions:", *lines, _TYPES])
        return function

    return document


def _meanings(kinds: Sequence[type[Any]]) -> dict[str, str]:
    """Return what the options of these classes, the first first, and of our methods mean."""
    found = {one.name: _meaning(one) for kind in reversed(kinds) for one in options(kind)}
    for name, owners in option_owners(built_in_names()).items():
        one = next(one for one in options(find_method(owners[0]).options) if one.name == name)
        found[name] = f"{', '.join(owners)}: {_meaning(one)} [{one.default}]"
    methods = f" ({', '.join(built_in_names())})"
    return found | {name: found[name] + methods for name in {"method", "methods"} & found.keys()}


def _meaning(one: Field[Any]) -> str:
    choices = ", ".join(one.metadata["choices"])
    return f"{one.metadata['help']} ({choices})" if choices else str(one.metadata["help"])


def with_arguments_of(
    other: Callable[Arguments, object],
) -> Callable[[Callable[[dict[str, Any]], Result]], Callable[Arguments, Result]]:
    """Give a function the arguments of another one, which it gets as a dictionary."""
    signature = inspect.signature(other)

    def decorate(function: Callable[[dict[str, Any]], Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def call(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
            bound = signature.bind(*args, **keywords)
            bound.apply_defaults()
            return function(bound.arguments)

        vars(call)["__signature__"] = signature
        return call

    return decorate
