"""Held-out windows: beside the samples, which stay what they are, and beside each other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_gblm.commands.calibration import Documents, Text, calibration_samples
from lowmem_gblm.commands.held_out import held_out_starts, held_out_windows
from lowmem_gblm.errors import RequestError


def words(text: str) -> list[int]:
    """Return the numbers that a text consists of."""
    return [int(word) for word in text.split()]


def counting(start: int, count: int) -> str:
    return " ".join(str(number) for number in range(start, start + count))


@given(
    st.lists(st.integers(0, 180), max_size=8), st.integers(1, 20), st.integers(0, 9), st.integers()
)
def test_windows_overlap_neither_samples_nor_each_other(
    samples: list[int], length: int, count: int, seed: int
) -> None:
    total = 200
    samples = [start for start in samples if start + length <= total]
    found = held_out_starts(samples, total, length, count, random.Random(seed))
    taken = [set(range(start, start + length)) for start in samples]
    for start in found:
        window = set(range(start, start + length))
        assert window <= set(range(total))
        assert not any(window & other for other in taken)
        taken.append(window)
    # Fewer are found only where the gaps have no more.
    edges = [0, *sorted(start + length for start in samples)]
    ends = [*sorted(samples), total]
    room = sum(max(0, end - edge) // length for edge, end in zip(edges, ends, strict=True))
    assert len(found) == min(count, room)


@pytest.mark.parametrize("bos", [None, 5000])
def test_they_follow_the_samples_of_a_text(bos: int | None) -> None:
    text = Text(counting(0, 1000), "t")
    options = {"nsamples": 6, "seqlen": 20, "seed": 3, "bos": bos}
    alone = calibration_samples(text, words, **options).tokens_NT
    drawn = calibration_samples(text, words, **options, held_out=8).tokens_NT
    assert drawn[:6].equal(alone)
    windows = drawn[6:, bos is not None :]
    assert len(windows) == 8
    assert len(windows.unique()) == windows.numel()
    assert not set(windows.flatten().tolist()) & set(alone[:, bos is not None :].flatten().tolist())
    assert bos is None or drawn[:, 0].unique().tolist() == [bos]


def test_they_are_of_documents_that_no_sample_is_of() -> None:
    rows = [counting(1000 * number, 30 if number % 2 else 5) for number in range(24)]
    documents = Documents(rows, "d")
    options = {"nsamples": 4, "seqlen": 20, "seed": 1}
    alone = calibration_samples(documents, words, **options).tokens_NT
    drawn = calibration_samples(documents, words, **options, held_out=8).tokens_NT
    assert drawn[:4].equal(alone)
    used = set((alone[:, 0] // 1000).tolist())
    held_out = (drawn[4:, 0] // 1000).tolist()
    assert len(set(held_out)) == 8
    assert not used & set(held_out)
    with pytest.raises(RequestError, match=r"beside the calibration samples d has \d+ windows of"):
        calibration_samples(documents, words, **options, held_out=12)


def test_they_follow_packed_samples_and_repeat_no_document() -> None:
    documents = Documents([counting(1000 * number, 12) for number in range(16)], "d")
    options = {"nsamples": 3, "seqlen": 16, "seed": 1, "packing": True}
    alone = calibration_samples(documents, words, **options).tokens_NT
    drawn = calibration_samples(documents, words, **options, held_out=8).tokens_NT
    assert drawn[:3].equal(alone)
    assert len(drawn.unique()) == drawn.numel()
    with pytest.raises(RequestError, match="d has 9 windows of 16 tokens, and 10 are needed"):
        calibration_samples(documents, words, **options, held_out=10)


def test_one_for_eight_samples_is_held_out() -> None:
    assert [held_out_windows(count) for count in (1, 64, 128, 1000)] == [8, 8, 16, 125]
