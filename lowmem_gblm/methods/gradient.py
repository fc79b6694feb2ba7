"""Gradient only: weights times the magnitude of the loss gradient, within each output row.

The ablation of Das et al. 2023; see `gblm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_gblm.methods import Method, Statistics, by_score
from lowmem_gblm.options import check_options, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """The options of the methods that read gradients."""

    gradient_norm: str = option("l1", "how gradients add up over samples", choices=("l1", "l2"))

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def statistic(self) -> str:
        """Return the name of the statistic that holds the gradient magnitudes."""
        return f"gradient_{self.gradient_norm}"


def gradient_scores(weight_OI: Tensor, statistics: Statistics, options: GradientOptions) -> Tensor:
    """Return `|W| * G`, [out, in]."""
    return weight_OI.abs() * statistics[options.statistic]


METHOD = Method(
    name="gradient",
    title="|W|·G",
    paper="Das et al. 2023, arXiv 2311.04902 (ablation)",
    needs=lambda options: (options.statistic,),
    group="row",
    options=GradientOptions,
    decide=by_score(gradient_scores, "row", rowwise=True),
    bytes_per_weight=2,
)
