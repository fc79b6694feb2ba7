"""`tools/same_bytes`: what is the same, what differs, and what failed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from support.tools import TOOLS, load_tool


@pytest.fixture(scope="module")
def same_bytes() -> ModuleType:
    return load_tool("same_bytes")


@pytest.mark.slow
def test_another_damping_is_seen_where_it_matters(
    same_bytes: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    shutil.copytree(TOOLS.parent / "lowmem_gblm", other / "lowmem_gblm")
    source = other / "lowmem_gblm" / "methods" / "sparsegpt.py"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("DAMPING = 0.01\n", "DAMPING = 0.011\n"), encoding="utf-8")
    assert source.read_text(encoding="utf-8") != text
    fewer = [
        case
        for case in same_bytes.cases_of(tmp_path / "random-mixtral")
        if (case.method, case.place) in {("magnitude", "output"), ("sparsegpt", "in place")}
    ]
    monkeypatch.setattr(same_bytes, "cases_of", lambda model: [fewer[0], fewer[-2]])
    calibration = same_bytes.DEMO / "calibration.txt"
    assert same_bytes.compare(other, [], calibration, tmp_path) == 1
    _, magnitude, sparsegpt, summary = capsys.readouterr().out.splitlines()
    assert magnitude.split()[1:] == ["magnitude", "pruned", "output", "half", "same"]
    assert sparsegpt.split()[1:7] == ["sparsegpt", "dense", "in", "place", "half", "differs:"]
    assert summary == "2 cases, 1 not the same"


def test_a_verdict_names_what_is_not_the_same(same_bytes: ModuleType) -> None:
    verdict = same_bytes.verdict
    assert verdict({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) == "same"
    assert verdict({"a": "1", "b": "2"}, {"a": "1", "c": "2"}) == "differs: 2 of 3 tensors, first b"
    assert verdict({}, {}) == "fails: no tensors"
    broken = {same_bytes.FAILURE: "why"}
    assert verdict(broken, broken) == "fails: here: why; there: why"
    assert verdict({"a": "1"}, broken) == "fails: there: why"
