"""Pass 3: last block to first, forward again and backward, for the gradient magnitudes.

Checkpointed back-propagation over boundaries that were kept on the way forward (Griewank and
Walther's "checkpointing"; "rematerialization"), with one decoder block as the segment. Boundaries
that were not kept are computed again from the last one that was (`schedule.reverse_order`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.block_loader import Block, BlockLoader
from lowmem_gblm.model.matmul_tap import MatmulWeight, Tap
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.schedule import reverse_order
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.sweeps.dense import Commit, boundary, forward
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.sample_set import SampleSet
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from lowmem_gblm.sweeps.statistics.finite import all_finite
from lowmem_gblm.sweeps.statistics.gradient import Gradient, GradientNorm

Slices = Callable[[Block], list[list[MatmulWeight]]]
Keep = Callable[[Block, dict[MatmulWeight, Tensor]], None]
Finish = Callable[[Block, Sequence[ActivationStatistic]], list[str]]


def reverse_sweep(
    blocks: BlockLoader,
    streamed: StreamedModel,
    offload: Offload,
    samples: SampleSet,
    norm: GradientNorm,
    scale: float,
    progress: Progress,
    *,
    boundary_interval: int,
    slices: Slices,
    activations: Callable[[int], list[ActivationStatistic]],
    keep: Keep,
    finish: Finish,
    commit: Commit,
    first: int = 0,
) -> None:
    """Measure every block's gradient magnitudes, last block first.

    Args:
        samples: Which; those whose gradients overflow are scaled with less, and dropped if that
            does not help.
        norm: l1 or l2 over samples.
        scale: What the loss was multiplied with.
        boundary_interval: Which boundaries the dense sweep has kept.
        slices: The matrices of a block in parts whose accumulators fit at the same time; every
            part after the first takes a forward and a backward pass more.
        activations: Makes the activation statistics to measure in the same forward, per block, for
            so many samples.
        keep: Called with each resident block and the gradient magnitudes of every part of it; again
            where a sample was found to be non-finite in a later part.
        finish: Called last with each resident block and what was measured; it may prune and write.
            Returns what in the spill it will not read again.
        commit: Called after every step of `reverse_order`.
        first: Steps that are done already.
    """
    order = reverse_order(blocks.depth, boundary_interval)[first:]
    shortcut = _Shortcut(streamed)
    for block, backward in zip(
        blocks.stream([step.block for step in order]),
        [step.backward for step in order],
        strict=True,
    ):
        if not backward:
            forward(block, streamed, offload, samples, sweep="dense", name="reverse")
            commit([])
            progress.step()
            continue
        work = _BlockBackward(
            block=block,
            streamed=streamed,
            offload=offload,
            samples=samples,
            gradient=partial(Gradient, norm, scale),
            activations=activations,
            shortcut=shortcut,
        )
        measured = work.measured(slices(block), keep)
        past = [*finish(block, measured), boundary("gradient", block.index + 1)]
        commit([*past, boundary("dense", block.index)] if block.index else past)
        progress.step()


@dataclass(kw_only=True)
class _BlockBackward:
    """Forward and backward through one resident block, until all samples left are finite in it.

    Attributes:
        gradient: Makes the gradient magnitudes to measure, for some slots.
        activations: Makes the activation statistics, for so many samples.
    """

    block: Block
    streamed: StreamedModel
    offload: Offload
    samples: SampleSet
    gradient: Callable[[list[MatmulWeight]], Gradient]
    activations: Callable[[int], list[ActivationStatistic]]
    shortcut: _Shortcut

    def __post_init__(self) -> None:
        self._arrived = dict(self.samples.exponents)
        self._sent: dict[int, int] = {}

    def measured(self, parts: list[list[MatmulWeight]], keep: Keep) -> list[ActivationStatistic]:
        """Gradient magnitudes of every part, kept; returns what else was measured.

        Where a sample is non-finite, all begins anew without it: what it added cannot be taken
        back.
        """
        while True:
            measured = self.activations(len(self.samples.active))
            for number, slots in enumerate(parts):
                gradients = self._part(slots, [] if number else measured, goes_on=not number)
                if gradients is None:
                    break
                keep(self.block, gradients)
            else:
                return measured

    def _part(
        self, slots: list[MatmulWeight], measured: Sequence[ActivationStatistic], *, goes_on: bool
    ) -> dict[MatmulWeight, Tensor] | None:
        """Gradient magnitudes of some slots; None if a sample was non-finite."""
        order, gradient = self.samples.active, self.gradient(slots)
        found = self._run(order, gradient, measured, goes_on=goes_on)
        if not found and _are_finite(gradient, measured):
            return gradient.results()
        # Single samples are looked at in the memory of these.
        gradient.results()
        found = found or [n for n in order if not self._is_finite_alone(n, slots)]
        if not found:
            raise NonFiniteError(
                f"the statistics of block {self.block.index} overflow float32, though those of "
                f"every single sample are finite: fewer --nsamples may fit"
            )
        self.samples.reduce_scale_or_drop(found, "reverse", self.block.index)
        return None

    def _is_finite_alone(self, n: int, slots: list[MatmulWeight]) -> bool:
        gradient, measured = self.gradient(slots), self.activations(1)
        found = self._run([n], gradient, measured, goes_on=False)
        return not found and _are_finite(gradient, measured)

    def _run(
        self,
        order: Sequence[int],
        gradient: Gradient,
        measured: Sequence[ActivationStatistic],
        *,
        goes_on: bool,
    ) -> list[int]:
        """Run these samples; where it `goes_on`, their gradients go on to the block before.

        Returns:
            The samples whose gradients are not finite where they leave the block.
        """
        block, found = self.block, []
        tap = Tap(block.module, block.slots, [gradient, *measured])
        names = [boundary("dense", block.index), boundary("gradient", block.index + 1)]
        for n, (hidden, arriving) in self.offload.prefetch(names, order):
            exponent = self.samples.exponent(n)
            gradient.boost = 2.0**exponent
            if exponent != self._arrived.get(n, 0):
                arriving = arriving * 2.0 ** (self._arrived.get(n, 0) - exponent)
            leaving = _backward(self.streamed, block, hidden, arriving, tap)
            gradient.finish_sample()
            for statistic in measured:
                statistic.finish_sample()
            if not bool(all_finite(leaving)):
                found.append(n)
                continue
            if n == order[0] and self.shortcut.holds(block, tap.last, hidden, arriving, leaving):
                tap.skip(tap.last)
            if goes_on and block.index and self._sent.get(n) != exponent:
                self.offload.write_behind(boundary("gradient", block.index), n, leaving)
                self._sent[n] = exponent
        tap.check_all_seen()
        return found


def _are_finite(gradient: Gradient, measured: Sequence[ActivationStatistic]) -> bool:
    return gradient.is_finite() and all(statistic.is_finite() for statistic in measured)


def _backward(
    streamed: StreamedModel, block: Block, hidden: Tensor, arriving: Tensor, tap: Tap
) -> Tensor:
    """The gradient of the loss at the hidden states that enter the block."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = streamed.forward_block(block.index, hidden, tap)
    (leaving,) = torch.autograd.grad(out, hidden, arriving)
    return leaving


class _Shortcut:
    """Whether gradients need what the last product of a block comes to.

    They do not where it is only added to the residual stream, as in most architectures. Tried once
    per kind of block: without the product, the same bits must leave. Afterwards NaN stands for it,
    so that a block which does need it cannot go unnoticed. Where the attention of a GPU does not
    give the same bits twice, the product may be computed after all.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        self._streamed = streamed
        self._known: dict[tuple[type, MatmulWeight], bool] = {}

    def holds(
        self,
        block: Block,
        last: MatmulWeight | None,
        hidden: Tensor,
        arriving: Tensor,
        leaving: Tensor,
    ) -> bool:
        if last is None:
            return False
        kind = (type(block.module), last)
        if kind not in self._known:
            trial = Tap(block.module, block.slots, [])
            trial.skip(last)
            again = _backward(self._streamed, block, hidden, arriving, trial)
            self._known[kind] = torch.equal(leaving, again)
        return self._known[kind]
