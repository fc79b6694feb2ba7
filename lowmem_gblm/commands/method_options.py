"""The options of methods within a request: which method has them, and what the record says."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from lowmem_gblm.errors import RequestError, shown_value
from lowmem_gblm.methods import (
    MOST_CANDIDATES,
    Method,
    built_in_names,
    option_owners,
    usable_methods,
)
from lowmem_gblm.options import flag_of, options


def check_method_options(method: Method, given: Iterable[str], taken: Collection[str]) -> None:
    """Raise `RequestError` unless a method has the options `given`, none of which every run has.

    `taken` are the names of options that every run has.
    """
    own = {one.name for one in options(method.options)}
    if own & set(taken):
        raise RequestError(
            f"the method {method.name} has an option {flag_of(min(own & set(taken)))}, which every "
            f"run has: its author has to give it another name"
        )
    for name in given:
        if name not in own:
            raise no_option(name, [method.name])


def no_option(name: str, methods: Iterable[str]) -> RequestError:
    """Return the error for an option that none of these methods has."""
    owners = option_owners(usable_methods()).get(name)
    if owners is None:
        return RequestError(f"there is no option {shown_value(name)} of any method")
    having = " and ".join(owners)
    return RequestError(
        f"{flag_of(name)} is no option of {', '.join(methods)}: it belongs to {having}"
    )


def candidates_for(method: Method, given: Any, nsamples: int, seqlen: int) -> Sequence[Any]:
    """Return the options to choose among; empty where nothing of those `given` is "auto"."""
    found = method.candidates(given, nsamples, seqlen)
    if len(found) > MOST_CANDIDATES or (found and method.updates_weights):
        raise RequestError(
            f"the method {method.name} lets a run choose among {len(found)} options: its author "
            f"has to take {MOST_CANDIDATES} at most, and none where weights are updated"
        )
    return found


def recorded_options(given: Any) -> dict[str, Any]:
    """Return what the record says of the options of methods, from those of the method of the run.

    Every record has the options of all methods of this package: null where the method of the run
    has no such option.
    """
    nothing: dict[str, Any] = dict.fromkeys(option_owners(built_in_names()))
    own = [one.name for one in options(type(given)) if one.metadata["identity"]]
    return nothing | {name: getattr(given, name) for name in own}
