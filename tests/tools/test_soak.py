"""`tools/soak`: runs that are killed at random times, for a few seconds; and that it can tell."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from support.tools import TOOLS, load_tool

SMALL = ("--blocks", "2", "--width", "64", "--nsamples", "2", "--seqlen", "32")
REPORT = r"\d+ attempts, (\d+) kills, (\d+) finished runs, 0 differences\n"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load_tool("soak")


@pytest.mark.slow
def test_a_few_seconds_of_it_find_nothing(tmp_path: Path) -> None:
    """It goes on until there was some of each, however busy the machine is."""
    command = [str(TOOLS / "soak"), "--minutes", "0", *SMALL, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    report = re.fullmatch(REPORT, done.stdout)
    assert report
    kills, finished = map(int, report.groups())
    assert kills
    assert finished
    assert not list(tmp_path.iterdir())


def test_a_byte_that_differs_is_reported(soak: ModuleType, tmp_path: Path) -> None:
    found = soak.Soak(argparse.Namespace(seed=0), tmp_path)
    for name in ("a", "b", "pruning.json", *soak.MARKS):
        (tmp_path / name).write_text("1")
    expected = soak.content(tmp_path)
    assert expected.keys() == {"a", "b"}
    (tmp_path / "b").write_text("2")
    found._compare(soak.Variant("gblm", "pruned", True), soak.content(tmp_path), expected)
    found._compare(soak.Variant("wanda", "dense", False), expected, expected)
    assert found.report() == (
        "0 attempts, 0 kills, 2 finished runs, 1 differences\ngblm, pruned, in place: b"
    )


def test_a_run_that_fails_ends_it_and_is_named(soak: ModuleType, tmp_path: Path) -> None:
    found = soak.Soak(argparse.Namespace(seed=0), tmp_path)
    with pytest.raises(SystemExit, match="resume nowhere ended with 5"):
        found._attempt(["resume", "nowhere"], 1000)
