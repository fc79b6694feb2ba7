"""The search: every candidate for the options of the method prunes the model, windows judge them.

One sweep over the blocks serves all candidates. The input norms are those of the dense model; every
candidate decides by them and by the same gradients, and held-out windows run through the blocks
that it has pruned. The candidate whose model has the least loss on them is chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowmem_gblm.methods.masks import zero_removed
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.planning.keys import trial
from lowmem_gblm.planning.steps import Step
from lowmem_gblm.runtime.accelerator import synchronize
from lowmem_gblm.sweeps.context import PruneContext
from lowmem_gblm.sweeps.prune import measure
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic


def search_sweep(run: PruneContext) -> None:
    """Run held-out windows through every block as each candidate prunes it, first block first."""
    for step, block in run.blocks("search"):
        # What is known of a block is released before the next one is resident.
        _search_block(run, step, block)


def choose_candidate(run: PruneContext) -> None:
    """Compute the loss of the held-out windows in every candidate's model; choose the least."""
    count, candidates = len(run.held_out), len(run.search.candidates)
    for step in run.steps("choose"):
        losses: list[list[float]] = [[] for _ in range(candidates)]
        order = [number * count + n for n in range(count) for number in range(candidates)]
        with run.model.filled(run.checkpoint):
            for item, (hidden,) in run.offload.prefetch(step.reads, order):
                number, n = divmod(item, count)
                losses[number].append(_loss(run, hidden, run.held_out[n]))
                if number == candidates - 1:
                    run.progress.step()
        means = [sum(one) / count for one in losses]
        run.choose([mean if math.isfinite(mean) else None for mean in means])


def _search_block(run: PruneContext, step: Step, block: Block) -> None:
    measured = measure(run, step, block, "dense") if step.forwards else []
    decisions = _Decisions(run, step, block, measured)
    for number in range(len(run.search.candidates)):
        decisions.apply(number)
        _advance(run, block, number)


class _Decisions:
    """The decisions of all candidates about the matrices of a resident block."""

    def __init__(
        self,
        run: PruneContext,
        step: Step,
        block: Block,
        measured: Sequence[ActivationStatistic],
    ) -> None:
        self._block = block
        self._device = run.model.device
        self._dense: list[Tensor] = []
        # uint8: bit n is what candidate n decides.
        self._kept: list[Tensor] = []
        # With notes of their own: the chosen candidate's are those of the prune sweep.
        pruners = [
            replace(run.pruner, options=one, tensors={}, notes=[]) for one in run.search.candidates
        ]
        for weight, statistics in pruners[0].matrices(block, *run.known(step, block, measured)):
            values_OI = block.on_device(weight, self._device)
            kept_OI = torch.zeros(values_OI.shape, dtype=torch.uint8, device=self._device)
            for number, pruner in enumerate(pruners):
                kept_OI |= pruner.decide(weight, values_OI, statistics).keep.byte() << number
            self._dense.append(values_OI.clone())
            self._kept.append(kept_OI)
            del statistics

    def apply(self, number: int) -> None:
        """Prune the block, dense or as another candidate prunes it, as this candidate does."""
        for weight, dense_OI, kept_OI in zip(
            self._block.weights, self._dense, self._kept, strict=True
        ):
            values_OI = dense_OI.clone()
            zero_removed(values_OI, (kept_OI >> number & 1).bool())
            self._block.replace(weight, values_OI)
        synchronize(self._device)


@torch.no_grad()
def _advance(run: PruneContext, block: Block, number: int) -> None:
    """Run the held-out windows of a candidate through a block that it has pruned."""
    count = len(run.held_out)
    # Boundary 0 has them once for all candidates, after the samples.
    first = number * count if block.index else len(run.tokens)
    order = range(first, first + count)
    for item, (hidden,) in run.offload.prefetch([trial(block.index)], order):
        out = run.model.forward_block(block.index, hidden)
        run.offload.write_behind(trial(block.index + 1), item - first + number * count, out)


def _loss(run: PruneContext, hidden: Tensor, tokens_BT: Tensor) -> float:
    """Return the mean next-token cross-entropy of a window [1, T], as `eval` computes it."""
    labels_K = tokens_BT[0, 1:]
    losses_K, _ = run.model.token_losses(hidden, tokens_BT, torch.arange(len(labels_K)), labels_K)
    return float(losses_K.cpu().double().sum()) / len(labels_K)
