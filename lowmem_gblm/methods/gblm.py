"""GBLM-Pruner: activations and gradients together.

Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023.
Their code folds alpha = 100 into the stored gradients and keeps them in float16; here alpha is
applied once, to float32 gradients. The gradient is summed over the calibration samples while the
input norm is averaged, so the balance of the two terms depends on how many samples there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import Method, Statistics, by_score
from lowmem_gblm.methods.gradient import GradientOptions
from lowmem_gblm.options import option

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
# The paper's alpha, and its calibration samples and their tokens.
_ALPHA, _NSAMPLES, _SEQLEN = 100, 128, 2048
_FACTORS = (0, 0.01, 0.1, 1, 10, 100)


def as_alpha(value: float | str) -> float | str:
    """Return a number from 0 on, also of a text, or "auto"; raise `RequestError` for any other."""
    if value == AUTO:
        return AUTO
    found = math.nan if isinstance(value, bool) else _as_number(value)
    if not 0 <= found < math.inf:
        raise RequestError(f"--alpha must be auto or a number from 0 on; got {value}")
    return found


def _as_number(value: float | str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


@dataclass(frozen=True, kw_only=True)
class GblmOptions(GradientOptions):
    """The options of GBLM-Pruner."""

    alpha: float | str = option(
        100.0, "weight of the gradient term; auto: the best of six on held-out calibration text",
        parse=as_alpha, metavar="A",
    )  # fmt: skip


def alphas(options: GblmOptions, nsamples: int, seqlen: int) -> list[GblmOptions]:
    """Return the options to choose among where alpha is "auto".

    The norm is a mean over N samples, and G a sum: N times one gradient for `l1`, about √N times
    for `l2`. Over T tokens the norm grows as √T, and the gradient of their mean loss falls as 1/√T.
    Tried are 0, which is Wanda, and the alphas at which the terms have about the balance that 1,
    10, 100, 1000 and 10,000 give the paper's 128 samples of 2048 tokens with `l1`.
    """
    if options.alpha != AUTO:
        return []
    gradients = nsamples if options.gradient_norm == "l1" else nsamples**0.5
    same_balance = _ALPHA * _NSAMPLES / gradients * seqlen / _SEQLEN
    return [replace(options, alpha=float(f"{same_balance * factor:.3g}")) for factor in _FACTORS]


def gblm_scores(weight_OI: Tensor, statistics: Statistics, options: GblmOptions) -> Tensor:
    """Return `|W| * ||X|| + alpha * |W| * G`, [out, in]."""
    size_OI = weight_OI.abs()
    activation_term = size_OI * statistics["input_norm"]
    gradient_term = size_OI.mul_(statistics[options.statistic]).mul_(float(options.alpha))
    return activation_term.add_(gradient_term)


METHOD = Method(
    name="gblm",
    title="|W|·(‖X‖ + α·G)",
    paper="Das et al. 2023, arXiv 2311.04902",
    needs=lambda options: ("input_norm", options.statistic),
    group="row",
    options=GblmOptions,
    candidates=alphas,
    decide=by_score(gblm_scores, "row", rowwise=True),
    bytes_per_weight=2,
)
