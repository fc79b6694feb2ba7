"""No error of a device costs a job: the tests of that once more, on the pretended device."""

from __future__ import annotations

import os
import subprocess
import sys

from support.pretend.jobs import PRETENDS, TESTS

CHOSEN = "gblm-pruned and (non_finite or memory) and (dense or reverse)"


def test_no_error_costs_a_job_on_the_device() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:xdist", "-k", CHOSEN,
            str(TESTS / "durability" / "test_device_errors.py"),
        ],
        env=os.environ | {PRETENDS: "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout, done.stdout
