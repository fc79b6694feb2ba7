"""Which weights stay: exact counts, ties by position, N:M, and how patterns are typed."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods.masks import (
    NofM,
    Unstructured,
    bisected,
    count_nonzero,
    keep_largest,
    keep_mask,
    parse_pattern,
    with_last_tied,
    zero_removed,
)

check = settings(deadline=None, max_examples=60, database=None)
sparsities = st.decimals("0.01", "0.99", places=2).map(Unstructured)
groups = st.sampled_from(["row", "matrix"])
any_width = st.integers(1, 24)


@st.composite
def tied_scores(draw, widths=any_width):
    """A score matrix [rows, width] with very few different values."""
    rows, width = draw(st.integers(1, 5)), draw(widths)
    count = rows * width
    few = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=count, max_size=count)
    return torch.tensor(draw(few)).view(rows, width)


def removed_by_sorting(row: list[float], count: int) -> set[int]:
    """The slow obvious way: sort positions by score and then position, take the first ones."""
    return set(sorted(range(len(row)), key=lambda index: (row[index], index))[:count])


def removed_by(keep_row: torch.Tensor) -> set[int]:
    return set((~keep_row).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [
        (100, "0.29", 29),
        (100, "0.57", 57),
        (10, "0.7", 7),
        (3, "0.5", 1),
        (1, "0.99", 0),
        (10**12, "0.3", 3 * 10**11),
        (10, "0." + 40 * "9", 9),
    ],
)
def test_counts_are_those_of_the_exact_decimal(size, sparsity, expected):
    assert parse_pattern(sparsity).removed(size) == expected


@check
@given(tied_scores(), sparsities)
def test_every_row_loses_its_smallest_lower_index_first(scores, pattern):
    keep = keep_mask(scores, pattern, "row")
    count = pattern.removed(scores.shape[1])
    for row, kept in zip(scores.tolist(), keep, strict=True):
        assert removed_by(kept) == removed_by_sorting(row, count)


@check
@given(tied_scores(), sparsities)
def test_the_whole_matrix_loses_its_smallest_in_row_major_order(scores, pattern):
    keep = keep_mask(scores, pattern, "matrix")
    count = pattern.removed(scores.numel())
    assert removed_by(keep.flatten()) == removed_by_sorting(scores.flatten().tolist(), count)


@check
@given(tied_scores(), st.data())
def test_any_number_can_be_removed_from_none_to_all(scores, data):
    count = data.draw(st.integers(0, scores.shape[1]))
    keep = keep_largest(scores, count)
    assert ((~keep).sum(dim=1) == count).all()


@check
@given(tied_scores(), sparsities, groups, st.integers(-20, 20))
def test_a_power_of_two_times_the_score_keeps_the_same(scores, pattern, group, power):
    scaled = scores * 2.0**power
    assert keep_mask(scaled, pattern, group).equal(keep_mask(scores, pattern, group))


@check
@given(tied_scores(), sparsities, sparsities, groups)
def test_more_sparsity_only_removes_more(scores, one, other, group):
    low, high = sorted((one, other), key=lambda pattern: pattern.sparsity)
    gained = keep_mask(scores, high, group) & ~keep_mask(scores, low, group)
    assert not gained.any()


@check
@given(st.integers(2, 8), st.data())
def test_n_of_every_m_stay_and_they_are_the_largest(m, data):
    n = data.draw(st.integers(1, m - 1))
    scores = data.draw(tied_scores(widths=st.integers(1, 4).map(lambda count: count * m)))
    keep = keep_mask(scores, NofM(n, m), "row").view(-1, m)
    for group, kept in zip(scores.view(-1, m).tolist(), keep, strict=True):
        assert removed_by(kept) == removed_by_sorting(group, m - n)


@check
@given(tied_scores(), st.integers(2, 8))
def test_a_ragged_tail_stays_whole(scores, m):
    tail = scores.shape[1] % m
    keep = keep_mask(scores, NofM(1, m, keep_ragged_tail=True), "row")
    whole = scores.shape[1] - tail
    assert keep[:, whole:].all()
    assert (keep[:, :whole].reshape(-1, m).sum(dim=1) == 1).all()


@check
@given(tied_scores(), sparsities, groups)
def test_scores_are_left_as_they_were(scores, pattern, group):
    before = scores.clone()
    keep_mask(scores, pattern, group)
    assert scores.equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_float_dtype_are_ranked(dtype):
    keep = keep_mask(torch.tensor([[3, 1, 2, 1]], dtype=dtype), parse_pattern("0.5"), "row")
    assert keep.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("sparsity", "pattern", "meant"),
    [
        (None, None, Unstructured(Decimal("0.5"))),
        ("0.29", None, Unstructured(Decimal("0.29"))),
        (0.29, None, Unstructured(Decimal("0.29"))),
        (Decimal("0.1"), "unstructured", Unstructured(Decimal("0.1"))),
        (None, "2:4", NofM(2, 4)),
        ("0.5", "2:4", NofM(2, 4)),
        (0.75, "1:4", NofM(1, 4)),
        (None, "1:3", NofM(1, 3)),
    ],
)
def test_what_is_typed_is_what_is_meant(sparsity, pattern, meant):
    assert parse_pattern(sparsity, pattern) == meant


@pytest.mark.parametrize("n_of_m", ["1:3", "2:3", "1:7", "4:6"])
def test_the_sparsity_of_a_pattern_read_back_as_a_float_still_agrees(n_of_m):
    pattern = parse_pattern(None, n_of_m)
    assert parse_pattern(float(pattern.sparsity), n_of_m) == pattern


def test_the_tail_is_kept_where_that_is_asked():
    assert parse_pattern(None, "2:4", keep_ragged_tail=True) == NofM(2, 4, keep_ragged_tail=True)


@pytest.mark.parametrize(("pattern", "text"), [("2:4", "2:4"), (None, "unstructured")])
def test_patterns_print_as_they_are_typed(pattern, text):
    assert str(parse_pattern(None, pattern)) == text


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.1", "1.5", 0, 1.0, "inf"])
def test_a_sparsity_outside_of_0_to_1_is_refused(sparsity):
    with pytest.raises(RequestError, match=f"must lie between 0 and 1.* got (?i:{sparsity})"):
        parse_pattern(sparsity)


@pytest.mark.parametrize("sparsity", ["nan", "snan", float("nan")])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_not_a_number_is_no_sparsity(sparsity, pattern):
    with pytest.raises(RequestError, match=f"sparsity .*(?i:{sparsity})"):
        parse_pattern(sparsity, pattern)


@pytest.mark.parametrize("sparsity", ["abc", "", "50%", "1/2"])
def test_a_sparsity_that_is_no_number_is_refused(sparsity):
    with pytest.raises(RequestError, match=r"must be a number such as 0\.5; got"):
        parse_pattern(sparsity)


@pytest.mark.parametrize("pattern", ["x", "2", "2:", ":4", "2:4:8", "2/4", "1.5:4", ""])
def test_a_pattern_that_is_not_n_of_m_is_refused(pattern):
    with pytest.raises(RequestError, match=r'must read "N:M", as in 2:4 .* got'):
        parse_pattern(None, pattern)


@pytest.mark.parametrize("pattern", ["4:2", "4:4", "0:4", "-1:4"])
def test_n_must_lie_between_0_and_m(pattern):
    with pytest.raises(RequestError, match=f"needs 0 < N < M .* got {pattern}"):
        parse_pattern(None, pattern)


def test_a_sparsity_that_contradicts_the_pattern_is_refused():
    with pytest.raises(RequestError, match=r"0\.5 contradicts --pattern 1:4, .* of 0\.75"):
        parse_pattern("0.5", "1:4")


def test_a_width_that_m_does_not_divide_is_refused_by_name():
    with pytest.raises(RequestError, match=r"mlp\.up has 50 inputs, which 4 .* a tail of 2"):
        NofM(2, 4).check_width("mlp.up", 50)


@pytest.mark.parametrize(("width", "keep"), [(48, False), (50, True)])
def test_a_width_that_m_divides_or_whose_tail_may_stay_is_accepted(width, keep):
    NofM(2, 4, keep_ragged_tail=keep).check_width("mlp.up", width)


@given(st.integers(1, 300), st.integers(-6, 6), st.booleans(), st.integers(0, 2**32 - 1), st.data())
def test_bisection_finds_what_a_selection_finds(
    numel: int, power: int, rounded: bool, seed: int, data: st.DataObject
) -> None:
    score = torch.randn(1, numel, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    score = score.round() if rounded else score
    k = data.draw(st.integers(1, numel))
    assert torch.equal(bisected(score, k), score.kthvalue(k, dim=1, keepdim=True).values)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_ties_of_all_rows_at_once_are_those_of_each_row(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    score = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed))
    score = score.float()
    removed = data.draw(st.integers(1, columns))
    threshold = score.kthvalue(removed, dim=1, keepdim=True).values
    at_once = with_last_tied(score > threshold, score == threshold, columns - removed)
    assert torch.equal(at_once, keep_largest(score, removed))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_removed_is_a_positive_zero_and_the_rest_stays_to_the_bit(
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :2] = torch.tensor([-0.0, 0.0], dtype=dtype)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    keep[0, :2] = True
    expected = [
        value if stays else 0.0
        for value, stays in zip(weight.double().flatten(), keep.flatten(), strict=True)
    ]
    zero_removed(weight, keep)
    found = weight.double().flatten()
    assert found.equal(torch.tensor(expected, dtype=torch.float64))
    assert found.signbit().equal(torch.tensor(expected, dtype=torch.float64).signbit())
    assert int(count_nonzero(weight)) == sum(value != 0 for value in expected)
