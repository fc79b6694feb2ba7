"""Rules: what is removed of which tensors.

A sparsity or a pattern is one for all tensors, or several by globs over their names. The first glob
that matches a tensor counts; globs of patterns come before those of sparsities.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

from lowmem_gblm.errors import RequestError, shown
from lowmem_gblm.methods.masks import (
    NofM,
    Pattern,
    as_pattern,
    as_sparsity,
    parse_n_of_m,
    parse_pattern,
    parse_sparsity,
)
from lowmem_gblm.planning.globs import check_globs

Sparsity = str | float | Decimal
EVERY = "*"


@dataclass(frozen=True)
class Rule:
    """The pattern of those tensors that a glob matches and no earlier rule has."""

    glob: str
    pattern: Pattern

    @property
    def option(self) -> str:
        """Return the option that says so."""
        return "pattern" if isinstance(self.pattern, NofM) else "sparsity"


def as_sparsities(value: Any) -> Any:
    """Return a sparsity, or sparsities by glob; raise `RequestError` for what is no number."""
    if isinstance(value, Mapping):
        return {glob: as_sparsity(one) for glob, one in value.items()}
    return as_sparsity(value)


def as_patterns(value: Any) -> str | dict[str, str]:
    """Return a pattern as text, or patterns by glob; each is given as "2:4" or as `(2, 4)`."""
    if isinstance(value, Mapping):
        return {glob: as_pattern(one) for glob, one in value.items()}
    return as_pattern(value)


def pattern_rules(
    sparsity: Sparsity | Mapping[str, Sparsity] | None,
    pattern: str | Mapping[str, str] | None,
    *,
    keep_ragged_tail: bool = False,
) -> tuple[Rule, ...]:
    """Return the rules that a sparsity and a pattern mean together.

    Where neither is by glob, `parse_pattern` says what they mean, for every tensor.
    """
    if not isinstance(sparsity, Mapping) and not isinstance(pattern, Mapping):
        found = parse_pattern(sparsity, pattern, keep_ragged_tail=keep_ragged_tail)
        return (Rule(EVERY, found),)
    patterns = _by_glob("pattern", None if pattern == "unstructured" else pattern)
    sparsities = _by_glob("sparsity", sparsity)
    return (
        *(Rule(glob, parse_n_of_m(text, keep_ragged_tail)) for glob, text in patterns.items()),
        *(Rule(glob, parse_sparsity(value)) for glob, value in sparsities.items()),
    )


def _by_glob(option: str, value: Any) -> Mapping[str, Any]:
    """Return the values of an option by glob; one for all tensors has a glob that matches all."""
    if not isinstance(value, Mapping):
        return {} if value is None else {EVERY: value}
    if not value or not all(isinstance(glob, str) for glob in value):
        raise RequestError(
            f"--{option} by glob takes globs over tensor names, each with its {option}; got "
            f"{shown(repr(value))}"
        )
    return value


def rule_of(name: str, rules: Iterable[Rule]) -> Rule | None:
    """Return the first rule whose glob matches the name of a tensor; None if none does."""
    return next((rule for rule in rules if fnmatchcase(name, rule.glob)), None)


def check_rules(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raise `RequestError` for a rule that decides for none of these tensors."""
    for option in ("pattern", "sparsity"):
        globs = [rule.glob for rule in rules if rule.option == option]
        check_globs(option, globs, names, "tensor that can be pruned")
    deciding = {rule_of(name, rules) for name in names}
    for rule in rules:
        if rule not in deciding:
            raise RequestError(
                f"the glob {shown(repr(rule.glob))} of --{rule.option} decides for no tensor: "
                f"earlier ones match all that it matches, and those of --pattern come before those "
                f"of --sparsity. Put it before them, or leave it out"
            )


def as_options(rules: Sequence[Rule]) -> dict[str, Any]:
    """Return the options that mean these rules, as texts: one value of each, or one by glob."""
    found: dict[str, dict[str, str]] = {}
    for rule in rules:
        value = rule.pattern if isinstance(rule.pattern, NofM) else rule.pattern.sparsity
        found.setdefault(rule.option, {})[rule.glob] = str(value)
    return {name: one.get(EVERY) if list(one) == [EVERY] else one for name, one in found.items()}


def described(rules: Sequence[Rule]) -> dict[str, Any]:
    """Return sparsity and pattern as they are recorded: one of each, or one of each by glob."""
    sparsity = {rule.glob: float(rule.pattern.sparsity) for rule in rules}
    pattern = {rule.glob: str(rule.pattern) for rule in rules}
    if list(pattern) == [EVERY]:
        return {"sparsity": sparsity[EVERY], "pattern": pattern[EVERY]}
    return {"sparsity": sparsity, "pattern": pattern}
