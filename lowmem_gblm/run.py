"""One run: what its passes work with, and the steps that it makes durable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from lowmem_gblm.disk.job import Job
from lowmem_gblm.disk.output import Output
from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.errors import CheckpointError, NonFiniteError, RequestError
from lowmem_gblm.interrupts import finished_first
from lowmem_gblm.model.stream import Block, BlockStream
from lowmem_gblm.progress import Listener, Progress
from lowmem_gblm.report import stages
from lowmem_gblm.stats.activation import ActivationStatistic, activation_statistics
from lowmem_gblm.sweeps.conveyor import Conveyor
from lowmem_gblm.sweeps.decide import Pruner
from lowmem_gblm.sweeps.magnitudes import Magnitudes
from lowmem_gblm.workbench import Workbench

# The same command would end in the same way again: nothing is worth keeping.
_HOPELESS = (CheckpointError, NonFiniteError, RequestError)


@dataclass(kw_only=True)
class Run:
    """What the passes of one run work with."""

    bench: Workbench
    job: Job
    blocks: BlockStream
    spill: Spill
    conveyor: Conveyor
    magnitudes: Magnitudes
    output: Output
    pruner: Pruner
    progress: Progress
    losses: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    def activations(self) -> list[ActivationStatistic]:
        """Fresh accumulators for one block."""
        return activation_statistics(self.bench.method.needs, len(self.bench.samples))

    def write(self, block: Block) -> None:
        """Write a pruned block, beside what comes next."""
        with self.progress.waiting():
            block.pending.append(self.output.write_block(block.index, block.raw))

    def done(self, name: str) -> int:
        """How many steps of a pass an earlier attempt has finished."""
        return len(self.job.done(name))

    def commit(self, name: str, drop: Sequence[str]) -> None:
        """Make a finished step durable: what it wrote, then the journal; then drop what is past.

        Where host memory stands in for the disk nothing can be resumed, and nothing is written
        down.

        Args:
            name: Of the pass.
            drop: What no later step reads.

        Raises:
            OSError: The disk is full or failing.
        """
        with self.progress.waiting():
            self.output.settle()
            self.conveyor.settle()
            with finished_first():
                if not self.bench.plan.host_spill_bytes:
                    waiting = self.spill.publish(but=drop)
                    self.job.add(self._entry(name, waiting, drop))
                for gone in drop:
                    self.spill.drop(gone)

    def _entry(self, name: str, waiting: dict[str, Any], drop: Sequence[str]) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self._since = round(now - self._since, 3), now
        return {
            "pass": name,
            "seconds": seconds,
            "waiting": waiting,
            "dropped": list(drop),
            "shards": self.output.news(),
            **self.pruner.news(),
            "losses": self.losses if name == "head" else [],
        }


@contextmanager
def begin_or_resume(bench: Workbench, listener: Listener | None) -> Iterator[Run]:
    """Everything the passes work with, as an earlier attempt has left it, or new.

    What is done stays when the run is interrupted or the disk is full; it goes when the run has
    ended, or has failed in a way that it would fail in again.

    Raises:
        JobError: Another job is there, or another process works on it.
    """
    job = Job(bench.work_folder, bench.description())
    with ExitStack() as within:
        try:
            output = Output(
                bench.output,
                bench.opened.checkpoint,
                bench.opened.skeleton.block_tensors,
                keep=_shards(job),
            )
        except BaseException:
            _put_away(job, None, keep=job.resumed)
            raise
        try:
            yield _assembled(bench, job, output, Progress(stages(bench), listener), within)
        except BaseException as error:
            within.close()
            _put_away(job, output, keep=job.resumed and not isinstance(error, _HOPELESS))
            raise
    _put_away(job, output, keep=False)


def _put_away(job: Job, output: Output | None, *, keep: bool) -> None:
    if output is not None:
        output.close(keep=keep)
    if keep:
        job.close()
    else:
        job.remove()


def _assembled(
    bench: Workbench, job: Job, output: Output, progress: Progress, within: ExitStack
) -> Run:
    checkpoint, skeleton = bench.opened.checkpoint, bench.opened.skeleton
    choices, request = bench.plan.choices, bench.request
    spill = within.enter_context(Spill(bench.work_folder, bench.plan.host_spill_bytes))
    spill.adopt(job.waiting())
    job.clean(job.waiting())
    conveyor = Conveyor(spill, skeleton.device, progress, choices.behind_bytes)
    run = Run(
        bench=bench,
        job=job,
        blocks=BlockStream(
            checkpoint,
            skeleton,
            progress,
            bench.weights,
            read_ahead=choices.read_ahead,
            copy_ahead=choices.copy_ahead,
            compute_weights=request.resident_kind,
        ),
        spill=spill,
        conveyor=within.enter_context(conveyor),
        magnitudes=Magnitudes(spill, conveyor, choices.store),
        output=output,
        pruner=Pruner(bench.method, request.target, request.alpha, skeleton.device),
        progress=progress,
    )
    for entry in job.entries:
        run.pruner.remember(entry)
        run.losses += entry["losses"]
        progress.remember(entry["pass"], entry["seconds"])
    return run


def _shards(job: Job) -> dict[str, Any]:
    """The shards that earlier attempts have finished."""
    return {name: shard for entry in job.entries for name, shard in entry["shards"].items()}
