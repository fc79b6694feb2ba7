"""The reverse sweep: last block to first, forward again and backward, for gradient magnitudes.

Checkpointed back-propagation over boundaries that were kept on the way forward (Griewank and
Walther's "checkpointing"; "rematerialization"), with one decoder block as the segment. Boundaries
that were not kept are computed again from the last kept one (`planning.steps.reverse_order`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.matmul_tap import MatmulWeight, Tap
from lowmem_gblm.planning.keys import boundary, loss_gradient
from lowmem_gblm.planning.sizes import FLOAT32_BYTES, slices_within
from lowmem_gblm.runtime.accelerator import is_accelerator, reproducible
from lowmem_gblm.sweeps.boundaries import advance
from lowmem_gblm.sweeps.context import PruneContext
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic, GradientStatistic
from lowmem_gblm.sweeps.statistics.finite import all_finite


def reverse_sweep(run: PruneContext) -> None:
    """Measure the gradient magnitudes of every block, last block first.

    Where no prune sweep follows, the block is pruned and written at once.
    """
    prunes = run.schedule.prune_in == "reverse"
    trials = _Trials(run)
    for step, block in run.blocks("reverse"):
        if not step.backwards:
            advance(run, step, block, "dense")
            continue
        measured = _BlockBackward(run, block, trials, dict(run.samples.exponents)).measure()
        if prunes:
            run.prune(step, block, measured)


@dataclass
class _BlockBackward:
    """Forward and backward through one resident block, until all active samples are finite.

    Attributes:
        arrived: The exponents with which gradients have arrived from the block after it.
    """

    run: PruneContext
    block: Block
    trials: _Trials
    arrived: dict[int, int]
    _sent: dict[int, int] = field(default_factory=dict)

    def measure(self) -> list[ActivationStatistic]:
        """Keep the gradient magnitudes of all parts; repeat all if a sample turns non-finite."""
        while True:
            measured = self._activations(len(self.run.samples.active))
            for number, matrices in enumerate(self._parts()):
                gradients = self._measure_part(matrices, [] if number else measured)
                if gradients is None:
                    break
                self.run.gradients.keep(self.block, gradients)
            else:
                return measured

    def _parts(self) -> list[list[MatmulWeight]]:
        """Return the matrices of the block in parts whose accumulators fit at the same time."""
        matrices, limit = self.block.slots, self.run.choices.accumulator_bytes
        sizes = [one.stored(self.block.module).numel() * FLOAT32_BYTES for one in matrices]
        return [[matrices[item] for item in part] for part in slices_within(sizes, limit)]

    def _activations(self, nsamples: int) -> list[ActivationStatistic]:
        """Return fresh accumulators of activations, where the block is pruned in this step."""
        return self.run.activations(nsamples) if self.run.schedule.prune_in == "reverse" else []

    def _gradient(self, matrices: list[MatmulWeight]) -> GradientStatistic:
        statistic = self.run.statistics.gradient
        assert statistic is not None, "a reverse sweep without a statistic of gradients"
        return statistic(self.run.loss_scale, matrices)

    def _measure_part(
        self, matrices: list[MatmulWeight], measured: Sequence[ActivationStatistic]
    ) -> dict[MatmulWeight, Tensor] | None:
        """Return the gradient magnitudes of some matrices; None if a sample was non-finite."""
        order, gradient = self.run.samples.active, self._gradient(matrices)
        found = self._run(order, gradient, measured)
        if not found and all(one.is_finite() for one in (gradient, *measured)):
            return gradient.results()
        # Single samples are looked at in the memory of these.
        gradient.results()
        found = found or [n for n in order if not self._is_finite_alone(n, matrices)]
        if not found:
            raise NonFiniteError(
                f"the statistics of block {self.block.index} overflow float32, though those of "
                f"every single sample are finite: fewer --nsamples may fit"
            )
        hopeless = [n for n in found if not self.run.samples.reduce_scale(n)]
        self.run.samples.drop(hopeless, "reverse", self.block.index)
        return None

    def _is_finite_alone(self, n: int, matrices: list[MatmulWeight]) -> bool:
        gradient, measured = self._gradient(matrices), self._activations(1)
        found = self._run([n], gradient, measured)
        return not found and all(one.is_finite() for one in (gradient, *measured))

    def _run(
        self, order: list[int], gradient: GradientStatistic, measured: Sequence[ActivationStatistic]
    ) -> list[int]:
        """Run samples; return those whose gradients are not finite where they leave the block."""
        run, block, found = self.run, self.block, []
        tap = Tap(block.module, block.slots, [gradient, *measured])
        keys = [boundary("dense", block.index), loss_gradient(block.index + 1)]
        for n, (hidden, arriving) in run.offload.prefetch(keys, order):
            exponent = run.samples.exponent(n)
            gradient.boost = 2.0**exponent
            before = self.arrived.get(n, 0)
            if exponent != before:
                arriving = arriving * 2.0 ** (before - exponent)
            leaving = self.trials.backward(block, hidden, arriving, tap)
            for statistic in (gradient, *measured):
                statistic.finish_sample()
            if not bool(all_finite(leaving)):
                found.append(n)
                continue
            if n == order[0] and self.trials.may_skip_last(block, tap, hidden, arriving, leaving):
                tap.skip(tap.last)
            # Once at each scale, however often the block is run.
            if block.index and self._sent.get(n) != exponent:
                run.offload.write_behind(loss_gradient(block.index), n, leaving)
                self._sent[n] = exponent
        tap.check_all_seen()
        return found


class _Trials:
    """What is tried once for each kind of block, before the statistics are gathered.

    Whether gradients need the last product of the block; most architectures do not. Where the
    product is only added to the residual stream, the same bits leave without it; NaN then stands
    for it, so that a block which does need it fails.

    Whether a GPU has kernels for the block that give the same bits twice.
    """

    def __init__(self, run: PruneContext) -> None:
        self._run = run
        self._last_unneeded: dict[tuple[type, MatmulWeight], bool] = {}
        self._reproducible: dict[type, bool] = {}

    def backward(self, block: Block, hidden: Tensor, arriving: Tensor, tap: Tap) -> Tensor:
        """Return the gradient of the loss at the hidden states that enter the block."""
        kind = type(block.module)
        if kind not in self._reproducible:
            self._reproducible[kind] = self._is_reproducible(block, hidden, arriving)
        if not self._reproducible[kind]:
            return self._backward(block, hidden, arriving, tap)
        with reproducible(hidden.device):
            return self._backward(block, hidden, arriving, tap)

    def may_skip_last(
        self, block: Block, tap: Tap, hidden: Tensor, arriving: Tensor, leaving: Tensor
    ) -> bool:
        """Return whether the same gradient leaves the block without its last product."""
        if tap.last is None:
            return False
        kind = (type(block.module), tap.last)
        if kind not in self._last_unneeded:
            trial = Tap(block.module, block.slots, [])
            trial.skip(tap.last)
            again = self.backward(block, hidden, arriving, trial)
            self._last_unneeded[kind] = torch.equal(leaving, again)
        return self._last_unneeded[kind]

    def _is_reproducible(self, block: Block, hidden: Tensor, arriving: Tensor) -> bool:
        if not is_accelerator(hidden.device):
            return False
        try:
            with reproducible(hidden.device):
                self._backward(block, hidden, arriving, Tap(block.module, block.slots, []))
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            said = str(error).split(". ")[0]
            self._run.pruner.notes.append(f"gradients may differ in their last bits: {said}")
            return False
        return True

    def _backward(self, block: Block, hidden: Tensor, arriving: Tensor, tap: Tap) -> Tensor:
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            out = self._run.model.forward_block(block.index, hidden, tap)
        (leaving,) = torch.autograd.grad(out, hidden, arriving)
        return leaving
