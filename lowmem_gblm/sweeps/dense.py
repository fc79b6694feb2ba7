"""The dense sweep, and the head: the dense model forward, then losses and gradients."""

from collections.abc import Sequence

from torch import Tensor

from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.runtime.memory import give_back_freed
from lowmem_gblm.sweeps.batches import Batch, Row, Score
from lowmem_gblm.sweeps.boundaries import advance
from lowmem_gblm.sweeps.context import PruneContext, SweepContext
from lowmem_gblm.sweeps.prefix_check import check_block
from lowmem_gblm.sweeps.statistics.finite import all_finite

# Logits of other numbers of labels leave holes in freed memory, some megabytes for each batch; to
# give it back takes as long as a small batch.
_BATCHES_PER_TRIM = 16


def dense_sweep(run: SweepContext) -> None:
    """Run every sample through every block, first to last; the table says which boundaries stay."""
    for step, block in run.blocks("dense"):
        check_block(run, block)
        tap = Tap(block.module, block.slots, [])
        advance(run, step, block, "dense", tap)
        tap.check_all_seen()


def loss_gradients(run: PruneContext) -> None:
    """Compute the loss of every sample, and `loss_scale` times its gradient at the last boundary.

    Samples whose loss is not finite are dropped; a gradient that overflows gets a smaller scale.
    """
    for step in run.steps("head"):
        with run.model.filled(run.checkpoint):
            for n, (hidden,) in run.offload.prefetch(step.reads, run.samples.active):
                loss, gradient = _finite_loss(run, n, hidden)
                if gradient is None:
                    run.samples.drop([n], "head", None)
                else:
                    run.losses.append(float(loss))
                    run.offload.write_behind(step.writes[0], n, gradient)
                run.progress.step()


def _finite_loss(run: PruneContext, n: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss of a sample and its gradient; None for one that no scale makes finite."""
    while True:
        factor = run.loss_scale * 2.0 ** -run.samples.exponent(n)
        loss, gradient = run.model.loss_and_gradient(hidden, run.tokens[n], factor)
        if bool(loss.isfinite() & all_finite(gradient)):
            return loss, gradient
        if not bool(loss.isfinite()) or not run.samples.reduce_scale(n):
            return loss, None


def row_scores(run: SweepContext, batches: Sequence[Batch]) -> dict[Row, Score]:
    """Return the scores of all rows of the samples, which are `batches`, from the last boundary."""
    scores: dict[Row, Score] = {}
    for step in run.steps("head"):
        with run.model.filled(run.checkpoint):
            for n, (hidden,) in run.offload.prefetch(step.reads, range(len(batches))):
                places_K, labels_K = batches[n].wanted()
                layout = run.layouts.get(n)
                found = run.model.token_losses(hidden, run.tokens[n], places_K, labels_K, layout)
                scores |= batches[n].scores(*found)
                run.progress.step()
                if n % _BATCHES_PER_TRIM == 0:
                    give_back_freed()
    return scores
