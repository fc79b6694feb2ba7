"""Sequences that begin alike: which of them share a line, and how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.sweeps import prefix_groups
from lowmem_gblm.sweeps.batches import Row, pack
from lowmem_gblm.sweeps.prefix_groups import share_prefixes

LAYOUTS = st.builds(SharedPrefix, st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
# Few tokens and three contexts, so that sequences often begin alike.
CONTEXTS = [tuple(range(start, start + 40)) for start in (1, 50, 100)]
DRAWN = st.tuples(
    st.sampled_from(CONTEXTS), st.integers(1, 40), st.lists(st.integers(1, 3), max_size=9)
)
SEQUENCES = st.lists(
    DRAWN.map(lambda drawn: [*drawn[0][: drawn[1]], *drawn[2]]), min_size=1, max_size=30
)


def as_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()


def questions(count: int, *, context: int, ending: int, endings: int = 4) -> list[bytes]:
    """Sequences of so many questions, of which each has so many answers."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        asked = draw.integers(1, 1000, context)
        found += [as_bytes([*asked, *draw.integers(1, 1000, ending)]) for _ in range(endings)]
    return found


@given(LAYOUTS)
def test_an_ending_sees_the_prefix_and_itself(layout: SharedPrefix) -> None:
    arguments = layout.arguments(torch.float32, torch.device("cpu"))
    seen_TT = arguments["attention_mask"][0, 0] == 0
    # Of every place: the number of its ending, None in the prefix, and its position.
    places: list[tuple[int | None, int]] = [(None, at) for at in range(layout.prefix)]
    endings = product(range(layout.endings), range(layout.ending))
    places += [(number, layout.prefix + at) for number, at in endings]
    assert arguments["position_ids"].tolist() == [[position for _, position in places]]
    for (own, position), sees_T in zip(places, seen_TT, strict=True):
        expected = [
            number in (None, own) and other <= position and (number == own or own is not None)
            for number, other in places
        ]
        assert sees_T.tolist() == expected


@given(LAYOUTS)
def test_sequences_apart_are_the_prefix_and_one_ending(layout: SharedPrefix) -> None:
    line_T = torch.arange(len(layout))
    for number in range(layout.endings):
        sequence_T = layout.sequence(line_T, number)
        start = layout.prefix + number * layout.ending
        ending = range(start, start + layout.ending)
        assert sequence_T.tolist() == [*range(layout.prefix), *ending]


@given(SEQUENCES, st.integers(1, 100), st.sampled_from([32, 100, 2048]))
def test_no_sequence_is_lost_and_every_line_has_its_tokens(
    sequences: list[list[int]], sharing: int, tokens_at_once: int
) -> None:
    rows = [Row.of(tokens, [1], first=len(tokens) - 1) for tokens in sequences]
    batches = pack(rows, tokens_at_once, sharing=sharing)
    found = [row for batch in batches for rows in batch.sequences for row in rows]
    assert sorted(row.tokens for row in found) == sorted({row.tokens for row in rows})
    for batch in batches:
        layout = batch.layout
        if layout is not None:
            assert layout.prefix + layout.ending <= sharing
            assert batch.tokens_BT.numel() <= tokens_at_once
            placed = [
                layout.sequence(line_T, number)
                for line_T in batch.tokens_BT
                for number in range(layout.endings)
            ]
            for tokens_T, (row, *_) in zip(placed, batch.sequences, strict=True):
                read = np.frombuffer(row.tokens, np.int32).tolist()
                assert tokens_T.tolist() == read + [0] * (len(tokens_T) - len(read))


@given(SEQUENCES)
def test_labels_are_wanted_where_their_tokens_are(sequences: list[list[int]]) -> None:
    """The label of a position is its own token here."""
    rows = [Row.of(tokens, tokens, first=0) for tokens in sequences]
    for batch in pack(rows, 2048, sharing=100):
        places_K, labels_K = batch.wanted()
        assert batch.tokens_BT.flatten()[places_K].tolist() == labels_K.tolist()


def test_a_context_is_computed_once_for_all_answers() -> None:
    sequences = questions(50, context=100, ending=10)
    ((layout, groups),) = share_prefixes(
        sequences, longest_sequence=200, tokens_at_once=2048
    ).items()
    assert layout == SharedPrefix(prefix=96, ending=16, endings=4)
    assert sorted(one for group in groups for one in group) == sorted(sequences)


def test_what_all_questions_begin_with_is_computed_once_for_some() -> None:
    examples = list(range(1, 241))
    sequences = [as_bytes([*examples, *range(n, n + 20)]) for n in range(500, 528)]
    ((layout, groups),) = share_prefixes(
        sequences, longest_sequence=300, tokens_at_once=2048
    ).items()
    assert layout.prefix == 224
    assert layout.endings == len(groups[0]) == 7
    assert len(groups) == 4


def test_nothing_is_shared_where_it_saves_nothing() -> None:
    apart = {"longest_sequence": 200, "tokens_at_once": 2048}
    assert not share_prefixes(questions(9, context=7, ending=30), **apart)
    assert not share_prefixes(questions(9, context=100, ending=10, endings=1), **apart)
    # Longer than what may share, as where a model sees a window alone.
    longer = questions(9, context=100, ending=10)
    assert not share_prefixes(longer, longest_sequence=109, tokens_at_once=2048)


def test_masks_have_a_bound_and_the_best_layouts_are_kept(monkeypatch) -> None:
    sequences = [
        *questions(9, context=64, ending=8), *questions(2, context=160, ending=8),
        *questions(1, context=320, ending=8),
    ]  # fmt: skip
    asked = {"longest_sequence": 512, "tokens_at_once": 2048}
    every = share_prefixes(sequences, **asked)
    assert {layout.prefix for layout in every} == {64, 160, 320}
    monkeypatch.setattr(prefix_groups, "_MASK_NUMBERS", sum(len(one) ** 2 for one in every) - 1)
    kept = share_prefixes(sequences, **asked)
    assert {layout.prefix for layout in kept} == {64, 160}
