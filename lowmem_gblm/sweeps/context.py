"""What every sweep works with: the model, the samples, the steps that are left, how a step ends.

A step is finished when the body of the loop over `SweepContext.steps` or `SweepContext.blocks` has
ended; a step whose body raises stays unfinished, and a resumed run does the step again.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.model.block_loader import Block, BlockLoader
from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.schedule import Schedule, Stage
from lowmem_gblm.planning.sizes import Choices
from lowmem_gblm.planning.steps import Step
from lowmem_gblm.runtime.accelerator import release_cache
from lowmem_gblm.runtime.background import SerialWorker
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.in_place import BlockWriter
from lowmem_gblm.storage.job import Job
from lowmem_gblm.storage.journal import Journal
from lowmem_gblm.storage.tensor_store import TensorStore
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from lowmem_gblm.sweeps.gradient_store import GradientStore
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.option_search import OptionSearch
from lowmem_gblm.sweeps.sample_set import SampleSet
from lowmem_gblm.sweeps.saved_statistics import StatisticsSaver, TakenStatistics
from lowmem_gblm.sweeps.statistics import NeededStatistics
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic, Measured


@dataclass(kw_only=True)
class SweepContext:
    """The context of an evaluation, and the part of a prune run's that only runs samples.

    Attributes:
        tokens: Token ids of every sample, [B, T]; rows of a sample do not see each other.
        layouts: How the lines of a sample share prefixes, by its number; empty in a prune run.
        routed: Whether blocks send every token to some experts.
        held_out: Token ids of the windows by which a candidate is chosen, each [1, T]. In boundary
            0 they are numbered after the samples.
        table: The steps of the run, in order.
        done: How many steps of the table an earlier attempt has made durable.
        durable: Whether steps are written down; not where host memory stands in for the disk.
        losses: Loss of every active sample, in nats per token; empty before the head.
    """

    model: StreamedModel
    checkpoint: Checkpoint
    tokens: Sequence[Tensor]
    layouts: Mapping[int, SharedPrefix] = field(default_factory=dict)
    routed: bool = False
    held_out: Sequence[Tensor] = ()
    samples: SampleSet
    table: Sequence[Step]
    done: int = 0
    durable: bool
    job: Journal
    store: TensorStore
    loader: BlockLoader
    offload: Offload
    progress: Progress
    losses: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _committer: SerialWorker = field(default_factory=partial(SerialWorker, "commit"))

    def shape(self, n: int) -> tuple[torch.Size, SharedPrefix | None]:
        """Return what decides how blocks are called for a sample."""
        return self.tokens[n].shape, self.layouts.get(n)

    def is_done(self, stage: Stage) -> bool:
        """Return whether an earlier attempt has finished a stage."""
        return not self._left(stage)

    def steps(self, stage: Stage) -> Iterator[Step]:
        """Yield the steps of a stage that are left, and finish each when the body has ended."""
        # The streams of a pass do not use what others keep for themselves.
        release_cache(self.model.device)
        with self.progress.stage(stage):
            before = [step for step in self.table[: self.done] if step.stage == stage]
            counts = self.model.depth, len(self.tokens), len(self.held_out)
            self.progress.skip(sum(step.ticks(*counts) for step in before))
            for step in self._left(stage):
                self.offload.keys_read.clear()
                self.offload.keys_written.clear()
                self.offload.held = frozenset(step.held)
                yield step
                self._check_touched(step)
                self.finish(step)
                if step.block is not None:
                    self.progress.step()

    def blocks(self, stage: Stage) -> Iterator[tuple[Step, Block]]:
        """Yield the steps of a stage that are left, each with its resident block; see `steps`."""
        order = [step.block for step in self._left(stage) if step.block is not None]
        with closing(self.loader.stream(order)) as resident:
            for step in self.steps(stage):
                yield step, next(resident)
            # The last block is freed when another one is asked for.
            assert next(resident, None) is None

    def finish(self, step: Step) -> None:
        """Make a step durable: its tensors, then its journal entry; then drop what is read no more.

        A step that is not durable by itself becomes so with the next one that is. This happens
        beside the next step, in a thread; an OSError may be that of the step before. Where host
        memory stands in for the disk nothing can be resumed, and nothing is written down.
        """
        if not step.durable:
            for key in step.drops:
                self.store.drop(str(key))
            return
        with self.progress.waiting():
            self._committer.settle()
        names, writing = self.offload.in_flight()
        entry = self._journal_entry(step)
        names = names.union(self.store.written()).difference(entry["dropped"])
        self._committer.begin(self._make_durable, entry, names, writing)

    def close(self) -> None:
        """Let the step under way become durable."""
        self._committer.close()

    def _make_durable(
        self, entry: dict[str, Any], names: set[str], writing: Sequence[Future[None]]
    ) -> None:
        """Make a step durable, in the committing thread, once its writes to the store end."""
        for future in writing:
            future.result()
        if self.durable:
            # What is held in memory is no file.
            stored = self.store.publish(sorted(names & {*self.store.written()}))
            self.job.add(entry | {"stored": stored})
        for name in entry["dropped"]:
            self.store.drop(name)

    def _journal_entry(self, step: Step) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self._since = round(now - self._since, 3), now
        return {
            "stage": step.stage,
            "block": step.block,
            "seconds": seconds,
            "dropped": [str(key) for key in step.drops],
        }

    def _left(self, stage: Stage) -> list[Step]:
        return [step for step in self.table[self.done :] if step.stage == stage]

    def _check_touched(self, step: Step) -> None:
        """Assert that a step has read and written what the table says."""
        read, written = self.offload.keys_read, self.offload.keys_written
        assert read <= {*step.reads, *step.writes}, f"{step} has read {read}"
        assert written <= {*step.writes}, f"{step} has written {written}"
        untouched = {*step.reads} - read | {*step.writes} - written
        # Experts that saw no token have no gradient magnitudes.
        missing = [key for key in untouched if key.is_per_sample]
        assert not missing, f"{step} has not touched {missing}"


@dataclass(kw_only=True)
class PruneContext(SweepContext):
    """The context of a run that prunes.

    Attributes:
        loss_scale: The factor of the loss on its way back.
        statistics, taken: What is measured, and what an earlier run has saved.
        saver: Saves statistics for later runs; None if none are saved.
        search: The candidates for the options of the method, and their losses.
    """

    schedule: Schedule
    choices: Choices
    statistics: NeededStatistics
    loss_scale: float
    device_name: str
    job: Job
    gradients: GradientStore
    output: BlockWriter
    pruner: BlockPruner
    taken: TakenStatistics
    saver: StatisticsSaver | None
    search: OptionSearch
    _written: list[int] = field(default_factory=list)

    def activations(self, nsamples: int) -> list[ActivationStatistic]:
        """Return fresh accumulators of the statistics of activations, for one block."""
        return [kind(nsamples) for kind in self.statistics.activations]

    def prune(self, step: Step, block: Block, measured: Sequence[ActivationStatistic]) -> None:
        """Prune a block by its statistics, and write it, beside what comes next."""
        if step.saves and self.saver is not None:
            with self.progress.waiting():
                gradients = self._gradients_of(step, block)
                self.saver.save(block, measured, gradients, self.progress.check)
        self.pruner.prune(block, *self.known(step, block, measured))
        self.gradients.release()
        with self.progress.waiting():
            block.pending.append(self.output.write_block(block.index, block.raw))
        self._written.append(block.index)

    def known(
        self, step: Step, block: Block, measured: Sequence[ActivationStatistic]
    ) -> tuple[list[Measured], Iterable[Tensor | None]]:
        """Return the statistics of a block, measured or taken: of activations, and gradients."""
        taken = self.taken.activations if step.takes else ()
        return [*measured, *taken], self._gradients_of(step, block)

    def choose(self, losses: Sequence[float | None]) -> None:
        """Prune from now on with the options of the candidate that has the least of the losses."""
        self.search.losses = list(losses)
        self.pruner.options = self.search.candidates[self.search.chosen]

    def _gradients_of(self, step: Step, block: Block) -> Iterable[Tensor | None]:
        """Return the gradient magnitudes of the matrices of a block; empty if none are needed."""
        if self.statistics.gradient is not None:
            return self.gradients.of_block(block)
        return self.taken.gradients_of(block) if step.takes else ()

    def write_rest(self) -> None:
        """Write what no block holds, and the side files."""
        with self.progress.stage("finish"):
            # The last step becomes durable first.
            self._committer.settle()
            self.output.write_rest(self.progress.check)
            self.progress.step()

    def publish(
        self, record: dict[str, Any], card: str, manifest: dict[str, Any]
    ) -> dict[str, Any]:
        """Give the results their names, whatever interrupts; return `record` (pruning.json).

        `manifest` is what saved statistics are of; they come first, as the output ends the job.
        """
        self._committer.begin(self._publish, record, card, manifest).result()
        return record

    def _publish(self, record: dict[str, Any], card: str, manifest: dict[str, Any]) -> None:
        """Publish the results and forget the job, in the committing thread."""
        if self.saver is not None:
            self.saver.writer.publish(manifest)
        self.output.publish(record, card)
        self.job.forget()

    def _make_durable(
        self, entry: dict[str, Any], names: set[str], writing: Sequence[Future[None]]
    ) -> None:
        """Make the pruned blocks and saved statistics of a step durable, and then the step."""
        blocks = entry["blocks"]
        if blocks:
            self.output.settle()
        if self.durable:
            saved = {} if self.saver is None else self.saver.writer.finished(blocks)
            entry |= {"shards": self.output.finished(blocks), "statistics": saved}
        super()._make_durable(entry, names, writing)
        if self.durable:
            self.output.committed(blocks)

    def _journal_entry(self, step: Step) -> dict[str, Any]:
        blocks, self._written = self._written, []
        return {
            **super()._journal_entry(step),
            "device": self.device_name,
            "blocks": blocks,
            **self.pruner.journal_entry(),
            **self.samples.journal_entry(),
            "losses": self.losses if step.stage == "head" else [],
            "candidate_losses": self.search.losses if step.stage == "choose" else [],
        }
