"""How much longer a normalizer may make a text, against what it does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tokenizers import Regex, normalizers

from lowmem_gblm.model.normalizer import Growth, _worst

USUAL = [
    None,
    normalizers.BertNormalizer(),
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]),
    normalizers.Sequence([normalizers.Replace("…", "..."), normalizers.NFKD()]),
]
GREEDY = [
    normalizers.Replace(Regex(""), "abc"),
    normalizers.Replace(Regex("."), "abc"),
    normalizers.Replace("ab", "abababab"),
    normalizers.Prepend("abc" * 100),
    normalizers.Sequence([normalizers.Replace("a", "bb"), normalizers.Replace("b", "ccc")]),
]


def growth(normalizer: object) -> Growth:
    return Growth(SimpleNamespace(backend_tokenizer=SimpleNamespace(normalizer=normalizer)))


@pytest.mark.parametrize("normalizer", USUAL)
def test_what_models_have_is_not_even_tried(normalizer, monkeypatch):
    watch = growth(normalizer)
    monkeypatch.setattr(watch, "_normalizer", None)
    watch.check("A river … and a stone. " * 100)


@pytest.mark.parametrize("normalizer", GREEDY)
def test_the_worst_case_is_no_less_than_what_happens(normalizer):
    worst = _worst(json.loads(normalizer.__getstate__()))
    for text in ("a" * 64, "ab" * 32, "stones + rivers " * 4):
        assert len(normalizer.normalize_str(text)) <= worst * len(text) + 3


def test_a_text_is_looked_at_piece_by_piece():
    watch = growth(normalizers.Replace("river", "river" * 1000))
    watch.check("a stone and a stone " * 1000)
    with pytest.raises(ValueError, match="longer, expected at most 64 times"):
        watch.check("a stone and a stone " * 1000 + "and a river")


def test_what_could_not_even_be_tried_is_refused():
    twice = normalizers.Replace("a", "aa")
    with pytest.raises(ValueError, match=r"may make a text 1\.1e\+12 times longer"):
        growth(normalizers.Sequence([twice] * 40))


def test_a_tokenizer_in_python_has_no_normalizer():
    Growth(object()).check("a river")
