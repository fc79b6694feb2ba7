"""One run: what its passes work with, and the steps that it makes durable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.disk.behind import OneBehind
from lowmem_gblm.disk.files import NOTICE
from lowmem_gblm.disk.in_place import InPlace, Target
from lowmem_gblm.disk.job import Job, check_partial, read_description
from lowmem_gblm.disk.notice import Notice
from lowmem_gblm.disk.output import Output, partial_folder
from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.disk.trouble import explained, to_go_on, to_resume_or_discard
from lowmem_gblm.errors import BudgetError, DeviceError, JobError, LowmemGblmError
from lowmem_gblm.forecast import still_needed
from lowmem_gblm.identity import device_name
from lowmem_gblm.interruption import clear_up, interruption_first
from lowmem_gblm.machine import is_device_error
from lowmem_gblm.model.stream import Block, BlockStream
from lowmem_gblm.progress import Listener, Progress
from lowmem_gblm.report import stages
from lowmem_gblm.stats.activation import ActivationStatistic, activation_statistics
from lowmem_gblm.sweeps.conveyor import Conveyor
from lowmem_gblm.sweeps.decide import Pruner
from lowmem_gblm.sweeps.magnitudes import Magnitudes
from lowmem_gblm.sweeps.samples import Samples
from lowmem_gblm.workbench import Workbench

_LOST = "{} is partly pruned by now: if this cannot be mended, the model has to be fetched anew"


@dataclass(kw_only=True)
class Run:
    """What the passes of one run work with."""

    bench: Workbench
    job: Job
    blocks: BlockStream
    spill: Spill
    conveyor: Conveyor
    magnitudes: Magnitudes
    output: Target
    pruner: Pruner
    samples: Samples
    progress: Progress
    check_memory: Callable[[], None]
    losses: list[float] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)
    _committer: OneBehind = field(default_factory=partial(OneBehind, "commit"))
    _written: list[int] = field(default_factory=list)

    def activations(self, nsamples: int) -> list[ActivationStatistic]:
        """Fresh accumulators for one block."""
        return activation_statistics(self.bench.method.needs, nsamples)

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
            BudgetError: Host memory has run short.
        """
        self.check_memory()
        with self.progress.waiting():
            self.settle()
        names, arriving = self.conveyor.on_their_way()
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
        if not self.bench.plan.host_spill_bytes:
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
            "device": device_name(self.bench.opened.skeleton.device),
            "seconds": seconds,
            "dropped": list(drop),
            **self.pruner.news(),
            **self.samples.news(),
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
    bench: Workbench, listener: Listener | None, check_memory: Callable[[], None]
) -> Iterator[Run]:
    """Everything the passes work with, as an earlier attempt has left it, or new.

    What is done stays when the run is interrupted or the disk is full; it goes when the run has
    ended, or has failed before anything was done.

    Args:
        bench: What the run is made of.
        listener: Told of every step.
        check_memory: Raises `BudgetError` where host memory has run short.

    Raises:
        JobError: Another job is there, or another process works on it.
        DiskFull: The disk or a quota was used up.
        DiskError: A disk is failing, or a file or folder has gone that is needed.
    """
    try:
        with _begun(bench, listener, check_memory) as run:
            yield run
    except OSError as error:
        if error.errno is None:
            raise
        failed = Path(error.filename or bench.work_folder)
        needs = still_needed(bench.plan, bench.output, bench.work_folder, failed)
        kept = read_description(bench.work_folder) is not None
        raise explained(error, needs, to_go_on(bench.work_folder, kept=kept)) from error


@contextmanager
def _begun(
    bench: Workbench, listener: Listener | None, check_memory: Callable[[], None]
) -> Iterator[Run]:
    job = Job(bench.work_folder, bench.description(), bench.previous)
    with ExitStack() as within:
        try:
            output = _target(bench, job)
        except BaseException:
            if bench.request.in_place and not job.resumed:
                Notice(bench.output, bench.work_folder, job.id).remove()
            _put_away(job, None, keep=job.resumed)
            raise
        try:
            progress = Progress(stages(bench), listener)
            with interruption_first():
                yield _assembled(bench, job, output, progress, check_memory, within)
        except BaseException as error:
            clear_up()
            within.close()
            # What has finished steps is never removed: the cause may go away, as that of a device.
            keep, overwritten = job.resumed, bench.request.in_place and bool(_shards(job))
            _put_away(job, output, keep=keep)
            _raise_told(error, bench, keep=keep, overwritten=overwritten)
            raise
    try:
        _put_away(job, output, keep=False)
    except KeyboardInterrupt:
        job.remove()
        raise


def _raise_told(error: BaseException, bench: Workbench, *, keep: bool, overwritten: bool) -> None:
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
        hints.append(to_resume_or_discard(bench.work_folder, _discarded(bench, overwritten)))
    if overwritten:
        hints.append(_LOST.format(bench.output))
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


def _discarded(bench: Workbench, overwritten: bool) -> list[Path]:
    """What a person removes to give up a job; nothing where a model is partly overwritten."""
    if overwritten:
        return []
    other = bench.output / NOTICE if bench.request.in_place else partial_folder(bench.output)
    return [bench.work_folder, other]


def _target(bench: Workbench, job: Job) -> Target:
    """What the run writes to, as an earlier attempt has left it."""
    checkpoint, keep = bench.opened.checkpoint, _shards(job)
    if not bench.request.in_place:
        check_partial(bench.output, job)
        blocks = bench.opened.skeleton.block_tensors
        return Output(bench.output, checkpoint, blocks, job.owner, keep)
    return InPlace(checkpoint, bench.pruned_names, job, keep)


def _put_away(job: Job, output: Target | None, *, keep: bool) -> None:
    if not keep:
        with suppress(OSError):
            # In this order: a notice speaks of a job that is there.
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
    bench: Workbench,
    job: Job,
    output: Target,
    progress: Progress,
    check_memory: Callable[[], None],
    within: ExitStack,
) -> Run:
    checkpoint, skeleton = bench.opened.checkpoint, bench.opened.skeleton
    choices, request = bench.plan.choices, bench.request
    spill = within.enter_context(Spill(bench.work_folder, bench.plan.host_spill_bytes, job.anew))
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
        samples=Samples(len(bench.samples), scaled=bench.loss_scale > 1),
        progress=progress,
        check_memory=check_memory,
    )
    within.callback(run.close)
    for entry in job.entries:
        run.pruner.remember(entry)
        run.samples.remember(entry)
        run.losses += entry["losses"]
        progress.remember(entry["pass"], entry["seconds"])
    return run


def _shards(job: Job) -> dict[str, Any]:
    """The shards that earlier attempts have finished."""
    return {name: shard for entry in job.entries for name, shard in entry["shards"].items()}
