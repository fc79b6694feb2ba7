"""Each method on one matrix: its formula, its fallbacks, its complaints."""

from __future__ import annotations

import numpy
import pytest
import torch

from lowmem_gblm.errors import NonFiniteError, RequestError
from lowmem_gblm.methods import Statistics, find_method, method_names
from lowmem_gblm.methods.gblm import GblmOptions, gblm_scores
from lowmem_gblm.methods.gradient import gradient_scores
from lowmem_gblm.methods.magnitude import magnitude_scores
from lowmem_gblm.methods.masks import keep_mask, parse_pattern
from lowmem_gblm.methods.wanda import wanda_scores
from support import reference

HALF = parse_pattern("0.5")
SCORES = {
    "magnitude": magnitude_scores,
    "wanda": wanda_scores,
    "gradient": gradient_scores,
    "gblm": gblm_scores,
}
GROUPS = {"magnitude": "matrix", "wanda": "row", "gradient": "row", "gblm": "row"}


def formula(method, weight, x, g, alpha):
    """The score of DESIGN section 2, in float64."""
    w = numpy.abs(weight)
    return {
        "magnitude": w,
        "wanda": w * x[None, :],
        "gradient": w * g,
        "gblm": w * x[None, :] + alpha * w * g,
    }[method]


def random_weight(rows: int = 6, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def random_gram(width: int, tokens: int = 300, seed: int = 1) -> torch.Tensor:
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return 2 / 3 * (inputs.T @ inputs)


def statistics_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every statistic there is, for a weight of this shape."""
    generator = torch.Generator().manual_seed(2)
    return {
        "input_norm": torch.rand(weight.shape[1], generator=generator),
        "gradient_l1": torch.rand(weight.shape, generator=generator) / 50,
        "gram": random_gram(weight.shape[1]),
    }


def options_of(method: str):
    return find_method(method).options()


def decide(method: str, weight: torch.Tensor, statistics: Statistics, pattern):
    return find_method(method).decide(weight, statistics, pattern, options_of(method))


def needed(method: str, weight: torch.Tensor) -> Statistics:
    given = statistics_of(weight)
    return statistics({name: given[name] for name in needs(method)})


def needs(method: str) -> tuple[str, ...]:
    return find_method(method).needs_with(options_of(method))


def statistics(values: dict[str, torch.Tensor]) -> Statistics:
    return Statistics(values, per_output=("gradient_l1",))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("method", SCORES)
def test_the_score_is_its_formula(method, alpha):
    weight = random_weight()
    given = statistics_of(weight)
    expected = formula(
        method,
        weight.double().numpy(),
        given["input_norm"].double().numpy(),
        given["gradient_l1"].double().numpy(),
        alpha,
    )
    options = GblmOptions(alpha=alpha) if method == "gblm" else options_of(method)
    score = SCORES[method](weight, needed(method, weight), options)
    assert score.double().numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pattern", ["0.5", "0.29", "2:4"])
@pytest.mark.parametrize("method", SCORES)
def test_the_smallest_scores_of_the_comparison_group_go(method, pattern):
    weight = random_weight()
    target = parse_pattern(None, pattern) if ":" in pattern else parse_pattern(pattern)
    given = needed(method, weight)
    decision = decide(method, weight, given, target)
    score = SCORES[method](weight, given, options_of(method))
    assert find_method(method).group == GROUPS[method]
    assert decision.keep.equal(keep_mask(score, target, GROUPS[method]))
    assert decision.weight is None


@pytest.mark.parametrize("method", ["wanda", "gradient", "gblm"])
def test_rows_without_any_score_are_ranked_by_magnitude(method):
    weight = random_weight()
    given = {name: torch.zeros_like(value) for name, value in statistics_of(weight).items()}
    decision = decide(method, weight, statistics(given), HALF)
    assert decision.keep.equal(keep_mask(weight.abs(), HALF, "row"))


def test_one_silent_row_leaves_the_others_to_their_score():
    weight = random_weight()
    gradient = statistics_of(weight)["gradient_l1"]
    gradient[2] = 0
    keep = decide("gradient", weight, statistics({"gradient_l1": gradient}), HALF).keep
    expected = weight.abs() * gradient
    expected[2] = weight[2].abs()
    assert keep.equal(keep_mask(expected, HALF, "row"))


@pytest.mark.parametrize("method", method_names())
def test_what_a_method_needs_suffices_and_is_not_modified(method):
    weight = random_weight(width=24)
    given, before = needed(method, weight), needed(method, weight)
    original = weight.clone()
    decision = decide(method, weight, given, HALF)
    assert decision.keep.shape == weight.shape
    assert weight.equal(original)
    for name in needs(method):
        assert given[name].equal(before[name])


@pytest.mark.parametrize("method", [name for name in method_names() if needs(name)])
def test_every_need_is_read(method):
    weight = random_weight(width=24)
    for missing in needs(method):
        given = {name: v for name, v in statistics_of(weight).items() if name != missing}
        with pytest.raises(AssertionError, match="does not name"):
            decide(method, weight, statistics(given), HALF)


@pytest.mark.parametrize("method", method_names())
def test_a_method_is_called_like_its_file(method):
    found = find_method(method)
    assert found.name == method
    assert found.title
    assert found.paper


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match="unknown method 'obs': choose one of gblm, gradient"):
        find_method("obs")


@pytest.mark.parametrize("sick", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", SCORES)
def test_a_score_that_is_not_finite_is_refused_with_the_count(method, sick):
    weight = random_weight()
    weight[1, 3] = sick
    with pytest.raises(NonFiniteError, match="1 of 120 scores are not finite"):
        decide(method, weight, needed(method, weight), HALF)


@pytest.mark.parametrize(
    ("width", "pattern"),
    [
        (96, "0.5"),
        (300, "0.5"),
        (300, "0.29"),
        (128, "2:4"),
        (300, "2:4"),
        (96, "1:3"),
        (300, "1:3"),
        (300, "2:5"),
        (400, "50:200"),
    ],
)
def test_sparsegpt_sweeps_as_the_reference_does(width, pattern, monkeypatch):
    n, m = (int(part) for part in pattern.split(":")) if ":" in pattern else (0, 1)
    # The reference's column blocks are made to end where a group ends.
    monkeypatch.setattr(reference, "COLUMN_BLOCK", max(128 - 128 % m, m))
    weight, gram = random_weight(width=width), random_gram(width)
    gram[:, 5] = gram[5] = 0
    target = parse_pattern(None, pattern) if n else parse_pattern(pattern)
    amount = {"n_of_m": (n, m), "sparsity": None} if n else {"n_of_m": None, "sparsity": pattern}
    updated, keep = reference.sparsegpt(weight, gram, **amount)
    decision = decide("sparsegpt", weight, statistics({"gram": gram}), target)
    assert decision.keep.equal(keep)
    torch.testing.assert_close(decision.weight, updated, rtol=1e-5, atol=1e-5)
    assert decision.note is None


def test_sparsegpt_without_any_input_prunes_by_magnitude_and_updates_nothing():
    weight = random_weight()
    gram = statistics({"gram": torch.zeros(20, 20)})
    decision = decide("sparsegpt", weight, gram, HALF)
    assert decision.keep.equal(keep_mask(weight.abs(), HALF, "matrix"))
    assert decision.weight.equal(weight.masked_fill(~decision.keep, 0))


@pytest.mark.parametrize("pattern", ["0.29", "0.5"])
def test_sparsegpt_removes_exactly_as_many_of_every_column_block(pattern):
    weight = random_weight(rows=7, width=300)
    target = parse_pattern(pattern)
    keep = decide("sparsegpt", weight, needed("sparsegpt", weight), target).keep
    removed = [int((~part).sum()) for part in keep.split(128, dim=1)]
    assert removed == [target.removed(7 * columns) for columns in (128, 128, 44)]


def test_a_gram_matrix_of_few_tokens_needs_no_more_damping():
    weight = random_weight()
    gram = random_gram(20, tokens=3)
    assert decide("sparsegpt", weight, statistics({"gram": gram}), HALF).note is None


def test_a_slightly_indefinite_gram_matrix_is_damped_more_and_says_so():
    weight = random_weight()
    gram = random_gram(20, tokens=3)
    gram -= 0.05 * gram.diagonal().mean() * torch.eye(20)
    decision = decide("sparsegpt", weight, statistics({"gram": gram}), HALF)
    assert decision.note == "the gram matrix was not positive definite; damping raised to 0.1"
    assert decision.weight.isfinite().all()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 0), float("nan"), "gram matrix of the inputs is not finite"),
        ((0, 0), float("inf"), "gram matrix of the inputs is not finite"),
        ((3, 4), float("nan"), "gram matrix"),
        ((slice(None), slice(None)), -1.0, "stays indefinite at a damping of 100000"),
    ],
)
def test_a_gram_matrix_beyond_repair_is_refused(place, value, message):
    weight = random_weight()
    gram = random_gram(20)
    gram[place] = gram.T[place] = value
    with pytest.raises(NonFiniteError, match=message):
        decide("sparsegpt", weight, statistics({"gram": gram}), HALF)


@pytest.mark.parametrize("sick", [float("nan"), float("inf")])
def test_sparsegpt_refuses_weights_that_are_not_finite(sick):
    weight = random_weight()
    weight[1, 3] = sick
    with pytest.raises(NonFiniteError, match="updated weights are not finite"):
        decide("sparsegpt", weight, needed("sparsegpt", weight), HALF)


def test_what_is_derived_from_a_shared_statistic_is_computed_once():
    computed = []

    def total(value):
        computed.append(value)
        return float(value.sum())

    derived = {}
    shared, other = torch.ones(3), torch.full((3,), 2.0)
    for value, expected in ((shared, 3.0), (shared, 3.0), (other, 6.0)):
        assert Statistics({"gram": value}, (), derived).derived("gram", total) == expected
    assert len(computed) == 2


def test_what_is_derived_belongs_to_its_statistic_and_to_no_later_one_at_its_address():
    def first(value):
        return float(value[0])

    derived = {}
    for number in range(20):
        # Freed at once: without a reference the next one would lie where this one did.
        value = torch.full((1000,), float(number))
        assert Statistics({"gram": value}, (), derived).derived("gram", first) == number
        del value
