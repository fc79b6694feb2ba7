"""No error of a device costs a job: the tests of that once more, on the pretended device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:xdist", "-k", chosen,
            str(TESTS / "durability" / "test_device_errors.py"),
        ],
        env=os.environ | {PRETENDS: "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout, done.stdout
