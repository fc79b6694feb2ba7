"""Rules: which of several sparsities and patterns is that of a tensor."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem_gblm.commands.pattern_rules import as_options, described, pattern_rules, rule_of


@pytest.mark.parametrize(
    ("sparsity", "pattern", "expected"),
    [
        (None, None, {"a": "0.5", "b": "0.5"}),
        ("0.30", "unstructured", {"a": "0.30", "b": "0.30"}),
        (0.5, "2:4", {"a": "2:4", "b": "2:4"}),
        ({"a": 0.6, "*": "0.3"}, None, {"a": "0.6", "b": "0.3"}),
        ({"*": 0.3, "a": 0.6}, None, {"a": "0.3", "b": "0.3"}),
        ({"a": 0.6}, None, {"a": "0.6", "b": None}),
        ({"a": 0.6}, "unstructured", {"a": "0.6", "b": None}),
        (None, {"a": "2:4"}, {"a": "2:4", "b": None}),
        (0.3, {"a": "2:4"}, {"a": "2:4", "b": "0.3"}),
        ({"*": 0.3}, {"[ac]": "2:4"}, {"a": "2:4", "b": "0.3"}),
        ({"a": 0.3}, "2:4", {"a": "2:4", "b": "2:4"}),
    ],
)
def test_the_first_glob_counts_and_patterns_come_first(
    sparsity: Any, pattern: Any, expected: dict[str, str | None]
) -> None:
    rules = pattern_rules(sparsity, pattern)
    found = {name: rule_of(name, rules) for name in expected}
    for name, rule in found.items():
        amount = rule and str(rule.pattern if rule.option == "pattern" else rule.pattern.sparsity)
        assert amount == expected[name]
    again = pattern_rules(**{"sparsity": None, "pattern": None} | as_options(rules))
    assert again == rules


def test_one_for_all_is_recorded_as_one() -> None:
    assert described(pattern_rules(None, None)) == {"sparsity": 0.5, "pattern": "unstructured"}
    assert described(pattern_rules({"*": "0.3"}, None))["sparsity"] == 0.3
    assert described(pattern_rules(0.3, {"a": "1:4"})) == {
        "sparsity": {"a": 0.75, "*": 0.3},
        "pattern": {"a": "1:4", "*": "unstructured"},
    }
