"""Negative controls: each synchronization that is left out is noticed on the pretended device."""

from __future__ import annotations

from typing import Any

import pytest

from support.pretend.jobs import in_process

# What is left out, and what is said of it.
CONTROLS = {
    "nothing": None,
    "copies to the device": "may not have written yet",
    "copies to the host": "is reused while",
    "the event of a computed tensor": "may not have written yet",
    "the use by another stream": "is reused while",
    "pinned memory": "pageable memory",
    "a matrix on the device": "on different devices",
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    asked = {"model": "demo", "controls": list(CONTROLS)}
    outcome: dict[str, dict[str, Any]] = in_process("controls", asked)
    return outcome


@pytest.mark.parametrize("control", [name for name, said in CONTROLS.items() if said])
def test_what_is_left_out_is_noticed(control: str, found: dict[str, dict[str, Any]]) -> None:
    said = CONTROLS[control]
    assert said is not None
    noticed = [*found[control]["faults"], str(found[control]["error"])]
    assert any(said in one for one in noticed), noticed


def test_nothing_is_noticed_where_nothing_is_left_out(found: dict[str, dict[str, Any]]) -> None:
    assert found["nothing"] == {"faults": [], "error": None}


def test_a_copy_that_is_not_waited_for_brings_no_numbers(
    found: dict[str, dict[str, Any]],
) -> None:
    assert "non-finite" in str(found["copies to the device"]["error"])
