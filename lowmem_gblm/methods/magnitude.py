"""Magnitude pruning: the smallest weights of each matrix are removed.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_gblm.methods import Method, Statistics, by_score
from lowmem_gblm.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


def magnitude_scores(weight_OI: Tensor, statistics: Statistics, options: NoOptions) -> Tensor:
    """Return `|W|`, [out, in]; reads no statistic."""
    return weight_OI.abs()


METHOD = Method(
    name="magnitude",
    title="|W|",
    paper="Han et al. 2015, arXiv 1506.02626",
    needs=(),
    group="matrix",
    decide=by_score(magnitude_scores, "matrix"),
    bytes_per_weight=14,
)
