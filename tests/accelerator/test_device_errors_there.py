"""No error of a device costs a job: the tests of that once more, on the pretended device."""

from __future__ import annotations

import pytest

from support.forks import run_forked
from support.pretend.jobs import PRETENDS, TESTS

# Two errors at each of two stops; CI takes one at each.
CHOSEN = [
    "gblm-pruned and (non_finite and dense or memory and reverse)",
    pytest.param(
        "gblm-pruned and (non_finite and reverse or memory and dense)", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("chosen", CHOSEN)
def test_no_error_costs_a_job_on_the_device(chosen: str) -> None:
    tests = str(TESTS / "durability" / "test_device_errors.py")
    # Of what is imported there already, pytest says that it is too late to rewrite it.
    asked = ["-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-k", chosen]
    asked += ["-m", "", "--rootdir", str(TESTS.parent), tests]
    done = run_forked(pytest.main, asked, env={PRETENDS: "1"})
    assert done.code == 0, done.out
    assert "2 passed" in done.out, done.out
