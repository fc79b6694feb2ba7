"""The texts of the demo follow from the grammar, stay apart, and stay small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "lowmem_gblm" / "demo"
TEXTS = ("calibration.txt", "evaluation.txt")
LIMIT_BYTES = 3_000_000


def stories(name: str) -> list[str]:
    """Reads a committed text as its stories."""
    return (DEMO / name).read_text(encoding="utf-8").rstrip("\n").split("\n\n")


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_what_the_grammar_writes(name: str, monkeypatch: pytest.MonkeyPatch):
    """Anyone can make the committed bytes again."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    # A folder of caches would be taken for a tool.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    from story_grammar import demo_texts

    texts = demo_texts(set())
    assert sorted(texts) == sorted(TEXTS)
    assert (DEMO / name).read_bytes() == texts[name].encode()


def test_texts_share_no_story():
    """Otherwise the calibration would have seen what the evaluation measures."""
    calibration, evaluation = map(stories, TEXTS)
    assert len(calibration) > len(evaluation) > 100
    assert not set(calibration) & set(evaluation)


@pytest.mark.parametrize("name", TEXTS)
def test_story_is_complete(name: str):
    """Every story has its three paragraphs, is told once, and leaves no mark unfilled."""
    told = stories(name)
    assert len(set(told)) == len(told)
    assert {story.count("\n") for story in told} == {2}
    assert not set("{}[]|") & set("".join(told))


def test_demo_is_small():
    """The package carries the demo, so its size is everybody's download."""
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= LIMIT_BYTES
