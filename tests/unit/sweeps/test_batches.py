"""Rows of different lengths in batches: each once, few shapes, little padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_gblm.sweeps.batches import TOKENS_AT_ONCE, Batch, Row, Score, pack, shape_for

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=60)


def row(length: int, number: int = 0, labels: int = 1) -> Row:
    """A row whose tokens tell it from others; its last positions have labels."""
    labels = min(labels, length)
    return Row.of([number] * length, range(labels), first=length - labels)


def widths(batches: list[Batch]) -> list[list[int]]:
    return [[len(line[0]) for line in batch.sequences] for batch in batches]


@given(LENGTHS, st.integers(1, 2048))
def test_every_row_is_in_one_batch_of_at_most_so_many_tokens(lengths: list[int], limit: int):
    rows = [row(length, number) for number, length in enumerate(lengths)]
    batches = pack(rows, limit)
    found = [one for batch in batches for rows in batch.sequences for one in rows]
    assert sorted(found, key=rows.index) == rows
    for batch in batches:
        assert batch.tokens_BT.numel() <= limit or len(batch.sequences) == 1
        assert batch.tokens_BT.shape[1] <= max(lengths)


@given(LENGTHS)
def test_a_line_is_its_tokens_and_then_padding(lengths: list[int]) -> None:
    for batch in pack([row(length, number + 1) for number, length in enumerate(lengths)], 2048):
        for tokens_T, (one,) in zip(batch.tokens_BT, batch.sequences, strict=True):
            assert tokens_T.tolist()[: len(one)] == [int(tokens_T[0])] * len(one)
            assert not tokens_T[len(one) :].any()


@given(st.integers(1, 10_000), st.integers(0, 3))
def test_a_batch_fits_and_padding_is_at_most_a_third_or_few_tokens(length: int, halved: int):
    limit = max(length, TOKENS_AT_ONCE >> halved)
    lines, padded = shape_for(length, limit)
    assert length <= padded <= max(length * 4 / 3, length + 3)
    assert lines == 1 or lines * padded <= limit


def test_full_batches_have_as_many_tokens_whatever_their_lengths() -> None:
    shapes = [shape_for(length, TOKENS_AT_ONCE) for length in range(1, TOKENS_AT_ONCE + 1)]
    sizes = [lines * length for lines, length in shapes]
    assert {size for size, (lines, _) in zip(sizes, shapes, strict=True) if lines > 3} == {1680}
    assert len(set(sizes)) < 20


def test_much_padding_is_rare_where_there_are_many_rows() -> None:
    rows = [row(20 + 7 * number % 300, number) for number in range(2000)]
    batches = pack(rows, 2048)
    assert sum(batch.tokens_BT.numel() for batch in batches) < 1.1 * sum(map(len, rows))


def test_the_longest_row_alone_may_be_beyond_the_limit() -> None:
    assert widths(pack([row(9), row(100, 1), row(10, 2)], 20)) == [[100], [10], [9]]


def test_rows_of_one_length_keep_their_order() -> None:
    batches = pack([row(8, 3), row(8, 1), row(8, 2)], 8)
    assert [int(batch.tokens_BT[0, 0]) for batch in batches] == [3, 1, 2]


def test_rows_that_differ_in_labels_alone_share_a_line() -> None:
    yes, no, both = (Row.of([5, 6, 7], labels, first=1) for labels in ([7, 1], [7, 2], [7, 2]))
    (batch,) = pack([yes, no, both], 2048)
    assert batch.tokens_BT.tolist() == [[5, 6, 7]]
    places_K, labels_K = batch.wanted()
    assert places_K.tolist() == [1, 2, 1, 2]
    assert labels_K.tolist() == [7, 1, 7, 2]


def test_labels_are_wanted_at_the_places_of_their_rows() -> None:
    (batch,) = pack([Row.of([1, 2, 3], [3], first=2), Row.of([4, 5], [6, 7], first=0)], 2048)
    assert batch.tokens_BT.tolist() == [[1, 2, 3], [4, 5, 0]]
    places_K, labels_K = batch.wanted()
    assert places_K.tolist() == [2, 3, 4]
    assert labels_K.tolist() == [3, 6, 7]


def test_a_row_scores_the_sum_of_its_labels_and_is_likeliest_if_all_are() -> None:
    first, second = Row.of([1, 2, 3], [3], first=2), Row.of([4, 5], [6, 7], first=0)
    (batch,) = pack([first, second], 2048)
    losses_K, likeliest_K = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([True, True, False])
    scores = dict(batch.scores(losses_K, likeliest_K))
    assert scores == {first: Score(-0.5, True), second: Score(-3.0, False)}
