"""Pass 3: last block to first, forward again and backward, for the gradient magnitudes.

Checkpointed back-propagation over boundaries that were kept on the way forward (Griewank and
Walther's "checkpointing"; "rematerialization"), with one decoder block as the segment. Boundaries
that were not kept are computed again from the last one that was (`schedule.reverse_order`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.stream import Block, BlockStream
from lowmem_gblm.model.tap import Slot, Tap
from lowmem_gblm.progress import Progress
from lowmem_gblm.schedule import reverse_order
from lowmem_gblm.stats.activation import ActivationStatistic
from lowmem_gblm.stats.gradient import Gradient, GradientNorm
from lowmem_gblm.sweeps.conveyor import Conveyor
from lowmem_gblm.sweeps.dense import Commit, boundary, forward

Slices = Callable[[Block], list[list[Slot]]]
Keep = Callable[[Block, dict[Slot, Tensor]], None]
Finish = Callable[[Block, Sequence[ActivationStatistic]], list[str]]


def reverse_sweep(
    blocks: BlockStream,
    skeleton: Skeleton,
    conveyor: Conveyor,
    nsamples: int,
    norm: GradientNorm,
    scale: float,
    progress: Progress,
    *,
    kept_every: int,
    slices: Slices,
    activations: Callable[[], list[ActivationStatistic]],
    keep: Keep,
    finish: Finish,
    commit: Commit,
    first: int = 0,
) -> None:
    """Measure every block's gradient magnitudes, last block first.

    Args:
        norm: l1 or l2 over samples.
        scale: What the loss was multiplied with.
        kept_every: Which boundaries the dense sweep has kept.
        slices: The matrices of a block in parts whose accumulators fit at the same time; every
            part after the first takes a forward and a backward pass more.
        activations: Makes the activation statistics to measure in the same forward, per block.
        keep: Called with each resident block and the gradient magnitudes of every part of it.
        finish: Called last with each resident block and what was measured; it may prune and write.
            Returns what in the spill it will not read again.
        commit: Called after every step of `reverse_order`.
        first: Steps that are done already.
    """
    order = reverse_order(blocks.depth, kept_every)[first:]
    shortcut = _Shortcut(skeleton)
    for block, backward in zip(
        blocks.stream([step.block for step in order]),
        [step.backward for step in order],
        strict=True,
    ):
        if not backward:
            forward(block, skeleton, conveyor, nsamples, "dense")
            commit([])
            progress.step()
            continue
        measured = activations()
        for number, slots in enumerate(slices(block)):
            gradient = Gradient(norm, scale, slots)
            observers: list[Gradient | ActivationStatistic] = [gradient]
            if not number:
                observers += measured
            tap = Tap(block.module, block.slots, observers)
            _sample_by_sample(
                block, skeleton, conveyor, nsamples, tap, observers, shortcut, first=not number
            )
            keep(block, gradient.results())
        past = [*finish(block, measured), boundary("gradient", block.index + 1)]
        commit([*past, boundary("dense", block.index)] if block.index else past)
        progress.step()


def _sample_by_sample(
    block: Block,
    skeleton: Skeleton,
    conveyor: Conveyor,
    nsamples: int,
    tap: Tap,
    observers: Sequence[Gradient | ActivationStatistic],
    shortcut: _Shortcut,
    *,
    first: bool,
) -> None:
    """Forward and backward through one block; the `first` time, gradients go on to the next."""
    names = [boundary("dense", block.index), boundary("gradient", block.index + 1)]
    for n, (hidden, arriving) in enumerate(conveyor.arriving(names, nsamples)):
        leaving = _backward(skeleton, block, hidden, arriving, tap)
        if not bool(leaving.isfinite().all()):
            raise NonFiniteError(
                f"the gradient of calibration sample {n} overflows in block {block.index}"
            )
        for observer in observers:
            observer.finish_sample()
        if n == 0 and shortcut.holds(block, tap.last, hidden, arriving, leaving):
            tap.leave_out(tap.last)
        if first and block.index:
            conveyor.leaving(boundary("gradient", block.index), n, leaving)
    tap.check_all_seen()


def _backward(
    skeleton: Skeleton, block: Block, hidden: Tensor, arriving: Tensor, tap: Tap
) -> Tensor:
    """The gradient of the loss at the hidden states that enter the block."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = skeleton.forward_block(block.index, hidden, tap)
    (leaving,) = torch.autograd.grad(out, hidden, arriving)
    return leaving


class _Shortcut:
    """Whether gradients need what the last product of a block comes to.

    They do not where it is only added to the residual stream, as in most architectures. Tried once
    per kind of block: without the product, the same bits must leave. Afterwards NaN stands for it,
    so that a block which does need it cannot go unnoticed.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._known: dict[tuple[type, Slot], bool] = {}

    def holds(
        self, block: Block, last: Slot | None, hidden: Tensor, arriving: Tensor, leaving: Tensor
    ) -> bool:
        if last is None:
            return False
        kind = (type(block.module), last)
        if kind not in self._known:
            trial = Tap(block.module, block.slots, [])
            trial.leave_out(last)
            again = _backward(self._skeleton, block, hidden, arriving, trial)
            self._known[kind] = torch.equal(leaving, again)
        return self._known[kind]
