"""GBLM-Pruner: activations and gradients together.

Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023.
Their code folds alpha = 100 into the stored gradients and keeps them in float16; here alpha is
applied once, to float32 gradients. The gradient is summed over the calibration samples while the
input norm is averaged, so the balance of the two terms depends on how many samples there are.
"""

from __future__ import annotations

from torch import Tensor

from lowmem_gblm.methods import Method, Statistics, by_score, require


def gblm_scores(weight_OI: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """`|W| * ||X|| + alpha * |W| * G`, [out, in]."""
    size_OI = weight_OI.abs()
    activation_term = size_OI * require(statistics.input_norm)
    return activation_term + alpha * (size_OI * require(statistics.gradient))


METHOD = Method(
    name="gblm",
    title="|W|·(‖X‖ + α·G)",
    paper="Das et al. 2023, arXiv 2311.04902",
    needs=("input_norm", "gradient"),
    group="row",
    decide=by_score(gblm_scores, "row", rowwise=True),
    bytes_per_weight=2,
)
