"""One run: what its passes work with, and the steps that it makes durable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.commands.estimate import still_needed
from lowmem_gblm.commands.prune.identity import device_name
from lowmem_gblm.commands.prune.record import stages
from lowmem_gblm.commands.prune.setup import PruneSetup
from lowmem_gblm.errors import BudgetError, DeviceError, JobError, LowmemGblmError
from lowmem_gblm.model.block_loader import Block, BlockLoader
from lowmem_gblm.runtime.background import SerialWorker
from lowmem_gblm.runtime.machine import is_device_error
from lowmem_gblm.runtime.progress import Listener, Progress
from lowmem_gblm.runtime.signals import StopFlag, stop_on_signals
from lowmem_gblm.storage.checkpoint.file_access import MARKER_FILE
from lowmem_gblm.storage.checkpoint.writer import CheckpointWriter, partial_folder
from lowmem_gblm.storage.disk_errors import explained, to_go_on, to_resume_or_discard
from lowmem_gblm.storage.in_place import BlockWriter, InPlaceWriter
from lowmem_gblm.storage.in_place_marker import InPlaceMarker
from lowmem_gblm.storage.job import Job, check_partial, read_description
from lowmem_gblm.storage.tensor_store import TensorStore
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from lowmem_gblm.sweeps.gradient_store import GradientStore
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.sample_set import SampleSet
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic, activation_statistics

_LOST = "{} is partly pruned by now: if this cannot be mended, the model has to be fetched anew"


@dataclass(kw_only=True)
class SweepContext:
    """What the passes of one run work with."""

    setup: PruneSetup
    job: Job
    blocks: BlockLoader
    spill: TensorStore
    offload: Offload
    gradients: GradientStore
    output: BlockWriter
    pruner: BlockPruner
    samples: SampleSet
    progress: Progress
    losses: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _committer: SerialWorker = field(default_factory=partial(SerialWorker, "commit"))
    _written: list[int] = field(default_factory=list)

    def activations(self, nsamples: int) -> list[ActivationStatistic]:
        """Fresh accumulators for one block."""
        return activation_statistics(self.setup.method.needs, nsamples)

    def write(self, block: Block) -> None:
        """Write a pruned block, beside what comes next."""
        with self.progress.waiting():
            block.pending.append(self.output.write_block(block.index, block.raw))
        self._written.append(block.index)

    def done(self, name: str) -> int:
        """How many steps of a pass an earlier attempt has finished."""
        return len(self.job.done(name))

    def commit(self, name: str, drop: Sequence[str]) -> None:
        """Make a finished step durable: what it wrote, then the journal; then drop what is past.

        This happens in a thread of its own, beside the next step; one step at a time.

        Where host memory stands in for the disk nothing can be resumed, and nothing is written
        down.

        Args:
            name: Of the pass.
            drop: What no later step reads.

        Raises:
            OSError: The disk is full or failing; perhaps in the step before.
        """
        with self.progress.waiting():
            self.settle()
        names, arriving = self.offload.in_flight()
        names = names.union(self.spill.written()).difference(drop)
        step = _Step(self._entry(name, drop), sorted(names), self._written, arriving)
        self._written = []
        self._committer.begin(self._make_durable, step)

    def settle(self) -> None:
        """Wait until the last step is durable.

        Raises:
            OSError: The disk is full or failing.
        """
        self._committer.settle()

    def publish(self, made: dict[str, Any]) -> dict[str, Any]:
        """Give the result its place. Once begun this is done, whatever interrupts the run.

        Args:
            made: The record.

        Returns:
            `made`.
        """
        self._committer.begin(self._publish, made).result()
        return made

    def _publish(self, made: dict[str, Any]) -> None:
        """In a thread of its own."""
        self.output.publish(made)
        self.job.forget()

    def close(self) -> None:
        """Let the step under way become durable."""
        self._committer.close()

    def _make_durable(self, step: _Step) -> None:
        """In a thread of its own."""
        for future in step.arriving:
            future.result()
        if step.blocks:
            self.output.settle()
        if not self.setup.plan.host_spill_bytes:
            waiting = self.spill.publish(step.names)
            shards = self.output.finished(step.blocks)
            self.job.add(step.entry | {"waiting": waiting, "shards": shards})
            self.output.committed(step.blocks)
        for gone in step.entry["dropped"]:
            self.spill.drop(gone)

    def _entry(self, name: str, drop: Sequence[str]) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self._since = round(now - self._since, 3), now
        return {
            "pass": name,
            "device": device_name(self.setup.opened.streamed.device),
            "seconds": seconds,
            "dropped": list(drop),
            **self.pruner.journal_entry(),
            **self.samples.journal_entry(),
            "losses": self.losses if name == "head" else [],
        }


@dataclass(frozen=True)
class _Step:
    """A finished step: its entry in the journal, names in the spill, blocks, writes under way."""

    entry: dict[str, Any]
    names: list[str]
    blocks: list[int]
    arriving: list[Future[None]]


@contextmanager
def begin_or_resume(
    setup: PruneSetup, listener: Listener | None, stop: StopFlag
) -> Iterator[SweepContext]:
    """Everything the passes work with, as an earlier attempt has left it, or new.

    What is done stays when the run is interrupted or the disk is full; it goes when the run has
    ended, or has failed before anything was done.

    Args:
        setup: What the run is made of.
        listener: Told of every step.
        stop: What stops the run before its next sample; also requested by SIGINT and SIGTERM.

    Raises:
        JobError: Another job is there, or another process works on it.
        DiskFull: The disk or a quota was used up.
        DiskError: A disk is failing, or a file or folder has gone that is needed.
    """
    try:
        with _begun(setup, listener, stop) as run:
            yield run
    except OSError as error:
        if error.errno is None:
            raise
        failed = Path(error.filename or setup.work_folder)
        needs = still_needed(setup.plan, setup.output, setup.work_folder, failed)
        kept = read_description(setup.work_folder) is not None
        raise explained(error, needs, to_go_on(setup.work_folder, kept=kept)) from error


@contextmanager
def _begun(setup: PruneSetup, listener: Listener | None, stop: StopFlag) -> Iterator[SweepContext]:
    job = Job(setup.work_folder, setup.description(), setup.previous)
    with ExitStack() as signals, ExitStack() as within:
        try:
            output = _target(setup, job)
        except BaseException:
            if setup.request.in_place and not job.resumed:
                InPlaceMarker(setup.output, setup.work_folder, job.id).remove()
            _put_away(job, None, keep=job.resumed)
            raise
        signals.enter_context(stop_on_signals(stop))
        try:
            progress = Progress(stages(setup), listener, stop)
            yield _assembled(setup, job, output, progress, stop, within)
        except BaseException as error:
            within.close()
            # What has finished steps is never removed: the cause may go away, as that of a device.
            keep, overwritten = job.resumed, setup.request.in_place and bool(_shards(job))
            _put_away(job, output, keep=keep)
            _raise_told(error, setup, keep=keep, overwritten=overwritten)
            raise
        within.close()
        _put_away(job, output, keep=False)


def _raise_told(error: BaseException, setup: PruneSetup, *, keep: bool, overwritten: bool) -> None:
    """Raise an error that ends a run as one that says what is kept, and what to do with it.

    An interruption, and what a disk raises, are told elsewhere; any other error that is not ours
    gets a note for whoever reads its traceback.
    """
    told = _own_error(error)
    if told is None and not isinstance(error, Exception):
        return
    if isinstance(error, OSError):
        return
    hints = []
    if keep and not isinstance(told, JobError):
        hints.append(to_resume_or_discard(setup.work_folder, _discarded(setup, overwritten)))
    if overwritten:
        hints.append(_LOST.format(setup.output))
    if told is None:
        for hint in hints:
            error.add_note(hint)
        return
    if hints or told is not error:
        raise type(told)(". ".join([str(told), *hints])) from (None if told is error else error)


def _own_error(error: BaseException) -> LowmemGblmError | None:
    """The error as one of ours, where it is one or comes from a device."""
    if isinstance(error, LowmemGblmError):
        return error
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return BudgetError(f"out of memory: {first}")
    return DeviceError(f"the device has failed: {first}") if is_device_error(error) else None


def _discarded(setup: PruneSetup, overwritten: bool) -> list[Path]:
    """What a person removes to give up a job; nothing where a model is partly overwritten."""
    if overwritten:
        return []
    other = setup.output / MARKER_FILE if setup.request.in_place else partial_folder(setup.output)
    return [setup.work_folder, other]


def _target(setup: PruneSetup, job: Job) -> BlockWriter:
    """What the run writes to, as an earlier attempt has left it."""
    checkpoint, keep = setup.opened.checkpoint, _shards(job)
    if not setup.request.in_place:
        check_partial(setup.output, job)
        blocks = setup.opened.streamed.block_tensors
        return CheckpointWriter(setup.output, checkpoint, blocks, job.owner, keep)
    return InPlaceWriter(checkpoint, setup.pruned_names, job, keep)


def _put_away(job: Job, output: BlockWriter | None, *, keep: bool) -> None:
    if not keep:
        with suppress(OSError):
            # In this order: a marker speaks of a job that is there.
            if output is not None:
                output.withdraw()
            job.forget()
    if output is not None:
        output.close(keep=keep)
    if keep:
        job.close()
    else:
        job.remove()


def _assembled(
    setup: PruneSetup,
    job: Job,
    output: BlockWriter,
    progress: Progress,
    stop: StopFlag,
    within: ExitStack,
) -> SweepContext:
    checkpoint, streamed = setup.opened.checkpoint, setup.opened.streamed
    choices, request = setup.plan.choices, setup.request
    spill = within.enter_context(
        TensorStore(setup.work_folder, setup.plan.host_spill_bytes, job.anew)
    )
    spill.adopt(job.waiting())
    job.clean(job.waiting())
    offload = Offload(spill, streamed.device, progress, choices.behind_bytes)
    run = SweepContext(
        setup=setup,
        job=job,
        blocks=BlockLoader(
            checkpoint,
            streamed,
            progress,
            setup.weights,
            read_ahead=choices.read_ahead,
            copy_ahead=choices.copy_ahead,
            compute_weights=request.resident_kind,
        ),
        spill=spill,
        offload=within.enter_context(offload),
        gradients=GradientStore(spill, offload, choices.gradient_precision),
        output=output,
        pruner=BlockPruner(setup.method, request.target, request.alpha, streamed.device, stop=stop),
        samples=SampleSet(len(setup.samples), scaled=setup.loss_scale > 1),
        progress=progress,
    )
    within.callback(run.close)
    for entry in job.entries:
        run.pruner.restore(entry)
        run.samples.restore(entry)
        run.losses += entry["losses"]
        progress.restore(entry["pass"], entry["seconds"])
    return run


def _shards(job: Job) -> dict[str, Any]:
    """The shards that earlier attempts have finished."""
    return {name: shard for entry in job.entries for name, shard in entry["shards"].items()}
