"""GBLM-Pruner: activations and gradients together.

Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023.
Their code folds alpha = 100 into the stored gradients and keeps them in float16; here alpha is
applied once, to float32 gradients. The gradient is summed over the calibration samples while the
input norm is averaged, so the balance of the two terms depends on how many samples there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import Method, Statistics, by_score
from lowmem_gblm.methods.gradient import GradientOptions
from lowmem_gblm.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GblmOptions(GradientOptions):
    """The options of GBLM-Pruner."""

    alpha: float = option(100.0, "weight of the gradient term", parse=float, metavar="A")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise RequestError(f"--alpha must be a number from 0 on; got {self.alpha}")


def gblm_scores(weight_OI: Tensor, statistics: Statistics, options: GblmOptions) -> Tensor:
    """Return `|W| * ||X|| + alpha * |W| * G`, [out, in]."""
    size_OI = weight_OI.abs()
    activation_term = size_OI * statistics["input_norm"]
    gradient_term = size_OI.mul_(statistics[options.statistic]).mul_(options.alpha)
    return activation_term.add_(gradient_term)


METHOD = Method(
    name="gblm",
    title="|W|·(‖X‖ + α·G)",
    paper="Das et al. 2023, arXiv 2311.04902",
    needs=lambda options: ("input_norm", options.statistic),
    group="row",
    options=GblmOptions,
    decide=by_score(gblm_scores, "row", rowwise=True),
    bytes_per_weight=2,
)
