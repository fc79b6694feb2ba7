"""Wanda: weights times the norm of their input activations, compared within each output row.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_gblm.methods import Method, Statistics, by_score
from lowmem_gblm.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


def wanda_scores(weight_OI: Tensor, statistics: Statistics, options: NoOptions) -> Tensor:
    """Return `|W| * ||X||`, [out, in]."""
    return weight_OI.abs() * statistics["input_norm"]


METHOD = Method(
    name="wanda",
    title="|W|·‖X‖",
    paper="Sun et al. 2023, arXiv 2306.11695",
    needs=("input_norm",),
    group="row",
    decide=by_score(wanda_scores, "row", rowwise=True),
    bytes_per_weight=2,
)
