"""The structure of masks: against loops in Python, and where the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowmem_gblm.commands.promised_groups import PromisedGroups
from lowmem_gblm.commands.report.structure import (
    BINS,
    Lines,
    Overlap,
    density,
    overlap,
    structure,
    total,
)

OUT, IN = 24, 36


def groups_of(rows: int, *widths: tuple[int, int]) -> list[PromisedGroups]:
    """Groups of so many rows, for each width and how many of them lie side by side."""
    return [PromisedGroups(rows, columns, repeat, 0) for columns, repeat in widths]


GROUPS = {
    "rows": groups_of(1, (IN, 1)),
    "matrix": groups_of(OUT, (IN, 1)),
    "columns": groups_of(OUT, (16, 2), (4, 1)),
    "2:4": groups_of(1, (4, IN // 4)),
    "2:5 with a dense tail": groups_of(1, (5, 7), (1, 1)),
}
SHARES = {"2:4": [0.5], "2:5 with a dense tail": [0.6, 0.0]}


def cells(groups: list[PromisedGroups]) -> list[list[tuple[int, int]]]:
    """The places of the weights of every comparison group."""
    found, start = [], 0
    for one in groups:
        for side in range(one.repeat):
            first = start + side * one.columns
            for top in range(0, OUT, one.rows):
                found.append(
                    [
                        (row, column)
                        for row in range(top, top + one.rows)
                        for column in range(first, first + one.columns)
                    ]
                )
        start += one.repeat * one.columns
    return found


def random_mask(name: str, seed: int) -> Tensor:
    """A mask with equal numbers of zeros in all groups of one width, at random places."""
    draw = torch.Generator().manual_seed(seed)
    zero = torch.zeros(OUT, IN, dtype=torch.bool)
    for group in cells(GROUPS[name]):
        shares = SHARES.get(name, [0.4])
        share = shares[-1] if len(group) == 1 else shares[0]
        chosen = torch.randperm(len(group), generator=draw)[: int(share * len(group))]
        for at in chosen.tolist():
            zero[group[at]] = True
    return zero


def naive(
    zero: Tensor, groups: list[PromisedGroups], line: Callable[[tuple[int, int]], int], lines: int
) -> tuple[float, float]:
    """Sums of squares, found and by chance: from the covariance of every pair of a group."""
    counts, means, variances = [0.0] * lines, [0.0] * lines, [0.0] * lines
    for group in cells(groups):
        zeros = sum(bool(zero[cell]) for cell in group)
        share = zeros / len(group)
        both = share * (zeros - 1) / (len(group) - 1) if len(group) > 1 else share
        for cell in group:
            counts[line(cell)] += bool(zero[cell])
            means[line(cell)] += share
        in_line = [sum(line(cell) == at for cell in group) for at in range(lines)]
        for at, length in enumerate(in_line):
            variances[at] += length * share * (1 - share)
            variances[at] += length * (length - 1) * (both - share**2)
    squares = sum((count - mean) ** 2 for count, mean in zip(counts, means, strict=True))
    return squares, sum(variances)


@pytest.mark.parametrize("name", GROUPS)
def test_squares_are_those_of_loops(name: str) -> None:
    zero = random_mask(name, 1)
    # Not what chance gives, and other numbers of zeros in other groups.
    zero[:, 3] = True
    zero[5, :7] = False
    found = structure(zero, GROUPS[name])
    assert (found.weights, found.zeros) == (OUT * IN, int(zero.sum()))
    for lines, line, count in (
        (found.rows, lambda cell: cell[0], OUT),
        (found.columns, lambda cell: cell[1], IN),
    ):
        squares, by_chance = naive(zero, GROUPS[name], line, count)
        assert lines.lines == count
        assert lines.squares == pytest.approx(squares, abs=1e-9)
        assert lines.squares_by_chance == pytest.approx(by_chance, abs=1e-9)


@pytest.mark.parametrize("name", GROUPS)
def test_random_masks_have_a_dispersion_of_one(name: str) -> None:
    found = total(structure(random_mask(name, seed), GROUPS[name]) for seed in range(60))
    for lines in (found.rows, found.columns):
        if lines.dispersion is not None:
            assert lines.dispersion == pytest.approx(1, abs=5 * math.sqrt(2 / lines.lines))
    assert found.columns.dispersion is not None


@pytest.mark.parametrize("name", ["rows", "2:4", "2:5 with a dense tail"])
def test_rows_that_the_pattern_fixes_have_no_dispersion(name: str) -> None:
    rows = structure(random_mask(name, 0), GROUPS[name]).rows
    assert rows.dispersion is None
    assert rows.variance == pytest.approx(0, abs=1e-20)
    # All rows are in one bin, and are expected there.
    assert rows.histogram_B.tolist() == pytest.approx(rows.histogram_by_chance_B.tolist())


def test_stripes_are_as_dispersed_as_columns_are_long() -> None:
    zero = (torch.arange(IN) % 2 == 0).expand(OUT, IN)
    found = structure(zero, GROUPS["rows"])
    assert found.columns.dispersion == pytest.approx(OUT)
    assert (found.columns.dead, found.rows.dead) == (IN // 2, 0)
    assert found.sparsity == 0.5
    turned = structure(zero.mT, groups_of(IN, (OUT, 1)))
    assert turned.rows.dispersion == pytest.approx(OUT * (OUT * IN - 1) / (OUT * (IN - 1)))
    assert turned.columns.squares == 0
    assert (turned.columns.dead, turned.rows.dead) == (0, IN // 2)


@pytest.mark.parametrize(("out", "share"), [(24, 0.5), (64, 0.3), (50, 0.9), (333, 0.5)])
def test_the_histogram_by_chance_is_about_binomial(out: int, share: float) -> None:
    inputs = 200
    zero = torch.zeros(out, inputs, dtype=torch.bool)
    zero[:, : int(share * inputs)] = True
    columns = structure(zero, groups_of(1, (inputs, 1))).columns
    expected = [0.0] * BINS
    for count in range(out + 1):
        chance = math.comb(out, count) * share**count * (1 - share) ** (out - count)
        expected[min(BINS - 1, count * BINS // out)] += inputs * chance
    found = columns.histogram_by_chance_B.tolist()
    assert found == pytest.approx(expected, abs=0.02 * inputs)
    assert sum(found) == pytest.approx(inputs)
    assert columns.histogram_B.tolist()[0] + columns.histogram_B.tolist()[-1] == inputs
    assert columns.dead_by_chance == pytest.approx(inputs * share**out)


def test_sums_of_matrices_are_those_of_all_their_lines() -> None:
    masks = [random_mask("matrix", seed) for seed in range(3)]
    found = total(structure(mask, GROUPS["matrix"]) for mask in masks)
    columns = torch.cat([mask.sum(dim=0) for mask in masks]).double()
    assert found.columns.lines == 3 * IN
    assert found.columns.variance == pytest.approx(float(columns.var(unbiased=False)))
    bins = [int(count) * BINS // OUT for count in columns]
    assert found.columns.histogram_B.tolist() == [bins.count(one) for one in range(BINS)]


def test_a_mask_shares_all_zeros_with_itself_and_none_with_the_rest() -> None:
    zero = random_mask("rows", 0)
    share = float(zero.float().mean())
    same, other = overlap(zero, zero), overlap(zero, ~zero)
    assert (same.jaccard, other.jaccard) == (1, 0)
    assert (same.share, other.share) == (pytest.approx(share), 0)
    assert same.share_by_chance == pytest.approx(share**2)
    assert other.share_by_chance == pytest.approx(share * (1 - share))
    assert same.jaccard_by_chance == pytest.approx(share / (2 - share))


def test_masks_of_no_relation_overlap_as_by_chance() -> None:
    found: Overlap = total(
        overlap(random_mask("rows", seed), random_mask("columns", seed + 1000))
        for seed in range(40)
    )
    assert found.share == pytest.approx(found.share_by_chance, abs=0.01)
    assert found.jaccard == pytest.approx(found.jaccard_by_chance, abs=0.01)
    assert found.weights == 40 * OUT * IN


def test_masks_without_zeros_agree() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert (overlap(nothing, nothing).jaccard, overlap(nothing, nothing).jaccard_by_chance) == (
        1,
        1,
    )
    columns: Lines = structure(nothing, groups_of(3, (4, 1))).columns
    assert (columns.dispersion, columns.dead) == (None, 0)


def test_a_small_mask_is_its_own_picture() -> None:
    zero = random_mask("rows", 0)
    assert torch.equal(density(zero, 100), zero.float())


@pytest.mark.parametrize("shape", [(300, 70), (64, 1000), (3, 5000), (512, 512)])
def test_a_picture_keeps_stripes_and_the_proportions_of_its_matrix(shape: tuple[int, int]) -> None:
    zero = (torch.arange(shape[1]) < shape[1] // 2).expand(shape)
    found = density(zero, 64)
    rows, columns = found.shape
    assert max(rows, columns) == 64
    assert rows == max(1, round(shape[0] * 64 / max(shape)))
    assert torch.equal(found[:, : columns // 2], torch.ones(rows, columns // 2))
    assert torch.equal(found[:, -(columns // 2) + 1 :], torch.zeros(rows, columns // 2 - 1))


def test_the_noise_of_a_picture_does_not_depend_on_its_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    spreads = [
        float(density(torch.rand(side, side, generator=draw) < 0.5, 64).std())
        for side in (128, 256, 512)
    ]
    assert spreads == pytest.approx([0.25] * 3, abs=0.01)
