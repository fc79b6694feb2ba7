"""Gradient only: weights times the magnitude of the loss gradient, within each output row.

The ablation of Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language
Models", 2023.
"""

from __future__ import annotations

from torch import Tensor

from lowmem_gblm.methods import Method, Statistics, by_score, require


def gradient_scores(weight_OI: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """`|W| * G`, [out, in]."""
    return weight_OI.abs() * require(statistics.gradient)


METHOD = Method(
    name="gradient",
    title="|W|·G",
    paper="Das et al. 2023, arXiv 2311.04902 (ablation)",
    needs=("gradient",),
    group="row",
    decide=by_score(gradient_scores, "row", rowwise=True),
    bytes_per_weight=2,
)
