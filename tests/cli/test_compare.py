"""A comparison that was interrupted goes on, and takes nothing for its own that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.commands.compare import pipeline as comparison
from lowmem_gblm.errors import JobError
from support.crashes import content
from support.tiny_models import save_tiny

METHODS = ("wanda", "gradient", "magnitude")
MEASURED = ("method", "perplexity", "sparsity")
Compare = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", blocks=2, width=16)


@pytest.fixture
def compare(model: Path, tmp_path: Path, text_file: Path) -> Compare:
    def call(output: str = "out", **options: Any) -> list[dict[str, Any]]:
        asked = {"nsamples": 2, "seqlen": 16, "calibration": str(text_file)}
        asked |= {"text": str(text_file), "windows": 2}
        return lowmem_gblm.compare(str(model), METHODS, tmp_path / output, **asked | options)

    return call


@pytest.fixture
def interrupted(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second method, before anything of it was done."""
    real = comparison.prune

    def prune(request: Any, listener: Any) -> dict[str, Any]:
        if request.method == METHODS[1]:
            raise KeyboardInterrupt
        return real(request, listener)

    monkeypatch.setattr(comparison, "prune", prune)
    with pytest.raises(KeyboardInterrupt):
        compare()
    monkeypatch.setattr(comparison, "prune", real)


def test_what_is_pruned_already_is_only_measured(
    interrupted: None, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/wanda").iterdir()}
    pruned: list[str] = []
    real = comparison.prune
    monkeypatch.setattr(
        comparison,
        "prune",
        lambda request, listener: pruned.append(request.method) or real(request, listener),
    )
    rows, whole = compare(), compare("whole")
    assert pruned == [*METHODS[1:], *METHODS]
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    for name in METHODS:
        assert content(tmp_path / "out" / name) == content(tmp_path / "whole" / name)
    for row, other in zip(rows, whole, strict=True):
        assert [row[name] for name in MEASURED] == [other[name] for name in MEASURED]
        assert (row["seconds"] is None) == (row["method"] == "dense")


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"sparsity": 0.6}, r"sparsity: 0\.5, now 0\.6"),
        ({"nsamples": 3}, "calibration_tokens: [0-9a-f]{8}…, now [0-9a-f]{8}…; nsamples: 2, now 3"),
        ({"activations": "dense"}, "activations: 'pruned', now 'dense'"),
    ],
)
def test_what_was_pruned_otherwise_is_not_taken(
    options: dict[str, Any], difference: str, interrupted: None, compare: Compare, tmp_path: Path
) -> None:
    before = content(tmp_path)
    sentence = rf"wanda was made otherwise \({difference}.*\): move it away, or choose another"
    with pytest.raises(JobError, match=sentence):
        compare(**options)
    assert content(tmp_path) == before


def test_another_model_is_not_taken_for_the_one_that_was_pruned(
    interrupted: None, compare: Compare, model: Path
) -> None:
    model.rename(model.with_name("first"))
    save_tiny("llama", model, blocks=2, width=16, seed=1)
    with pytest.raises(JobError, match=r"wanda was made otherwise \(source_bytes: "):
        compare()


def test_what_is_no_output_is_not_taken_for_one(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "out/gradient").mkdir(parents=True)
    with pytest.raises(JobError, match="gradient exists already"):
        compare()
