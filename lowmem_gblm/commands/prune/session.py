"""The context of one run: assembled as an earlier attempt left it, put away when the run ends."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

from lowmem_gblm.commands.estimate import limited
from lowmem_gblm.commands.prune.endings import Done, told_error
from lowmem_gblm.commands.prune.setup import PruneSetup
from lowmem_gblm.commands.texts import InMemory
from lowmem_gblm.errors import JobError
from lowmem_gblm.model.block_loader import BlockLoader
from lowmem_gblm.model.bnb import check_usable
from lowmem_gblm.planning.steps import steps_done
from lowmem_gblm.planning.totals import step_flops
from lowmem_gblm.runtime import memory
from lowmem_gblm.runtime.accelerator import device_name
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.runtime.signals import StopFlag, stop_on_signals
from lowmem_gblm.storage.checkpoint.writer import CheckpointWriter
from lowmem_gblm.storage.in_place import BlockWriter, InPlaceWriter
from lowmem_gblm.storage.in_place_marker import remove_marker
from lowmem_gblm.storage.job import Job, check_partial
from lowmem_gblm.storage.kept_samples import keep_samples
from lowmem_gblm.storage.statistics_folder import StatisticsWriter
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from lowmem_gblm.sweeps.context import PruneContext
from lowmem_gblm.sweeps.gradient_store import GradientStore
from lowmem_gblm.sweeps.offload import Offload, open_store
from lowmem_gblm.sweeps.option_search import OptionSearch
from lowmem_gblm.sweeps.sample_set import SampleSet
from lowmem_gblm.sweeps.saved_statistics import StatisticsSaver, TakenStatistics


@contextmanager
def start_or_resume(setup: PruneSetup, listener: Listener | None) -> Iterator[PruneContext]:
    """Run the body with everything that the sweeps work with, new or as an earlier attempt left it.

    What ends the body early is told as `commands.prune.endings` says.
    """
    device, stop = setup.scope.model.streamed.device, StopFlag()
    memory.settle_allocator(setup.scope.work.boundary_bytes)
    _check_quantization(setup)
    with limited(setup.budget, setup.plan, device, stop):
        try:
            job = Job(setup.paths.work_folder, setup.description(), setup.previous)
        except OSError as error:
            raise told_error(error, "nothing", setup) or error from error
        with ExitStack() as signals, ExitStack() as within:
            output = saved = None
            try:
                if isinstance(setup.scope.request.calibration, InMemory):
                    keep_samples(job.folder, setup.samples.tokens_NT)
                output = _writer(setup, job)
                saved = _statistics_writer(setup, job)
                signals.enter_context(stop_on_signals(stop))
                progress = Progress(_stages(setup), listener, stop)
                yield _assemble(setup, job, output, saved, progress, stop, within)
            except BaseException as error:
                within.close()
                refused = output is None and isinstance(error, JobError)
                done = _done(setup, job, refused=refused)
                told = told_error(error, done, setup)
                _put_away(setup, job, (output, saved), keep=done != "nothing")
                if told is not None:
                    raise told from (None if isinstance(error, type(told)) else error)
                raise
            within.close()
            _put_away(setup, job, (output, saved), keep=False)


def _stages(setup: PruneSetup) -> list[Stage]:
    """Return the stages of the run, each with its cost in FLOPs: the time left follows."""
    work = setup.scope.work
    counts = work.sizes.depth, *map(len, setup.scope.split(setup.samples.tokens_NT))
    found = []
    for name in work.schedule.stages:
        rows = [step for step in setup.table if step.stage == name]
        ticks = sum(step.ticks(*counts) for step in rows)
        found.append(Stage(name=name, steps=ticks, cost=sum(step_flops(one, work) for one in rows)))
    return [*found, Stage(name="finish", steps=1, cost=0)]


def _check_quantization(setup: PruneSetup) -> None:
    """Raise `RequestError` where bitsandbytes is needed and does not work on the device."""
    scope, kind = setup.scope, setup.scope.request.resident_kind
    device, precisions = scope.model.streamed.device, {setup.plan.choices.gradient_precision}
    if scope.work.saves or scope.work.takes:
        precisions.add(scope.magnitude_precision)
    if kind is not None:
        check_usable(device, kind)
    if "int8" in precisions:
        check_usable(device, "int8")


def _done(setup: PruneSetup, job: Job, *, refused: bool) -> Done:
    """Return what of a job is done; a model that was put back, and so `refused`, is complete."""
    if setup.paths.in_place and _files(job, "shards") and not refused:
        return "weights overwritten"
    return "finished steps" if job.entries else "nothing"


def _writer(setup: PruneSetup, job: Job) -> BlockWriter:
    scope, keep = setup.scope, _files(job, "shards")
    checkpoint = scope.model.checkpoint
    if setup.paths.in_place:
        return InPlaceWriter(checkpoint, scope.pruned_names, job, keep)
    check_partial(setup.paths.output, job)
    return CheckpointWriter(
        setup.paths.output,
        checkpoint,
        blocks=scope.model.streamed.block_tensors,
        order=[step.block for step in setup.table if step.prunes and step.block is not None],
        shard_bytes=scope.request.shard_bytes,
        owner=job.owner,
        keep=keep,
    )


def _statistics_writer(setup: PruneSetup, job: Job) -> StatisticsWriter | None:
    folder = setup.paths.statistics
    if folder is None:
        return None
    check_partial(folder, job)
    return StatisticsWriter(folder, job.owner, _files(job, "statistics"))


def _put_away(
    setup: PruneSetup,
    job: Job,
    writers: Iterable[BlockWriter | StatisticsWriter | None],
    *,
    keep: bool,
) -> None:
    """Leave a job for another attempt to `keep`, or remove what there is of it."""
    if not keep:
        with suppress(OSError):
            # In this order: a marker speaks of a job that is there.
            if setup.paths.in_place:
                remove_marker(setup.paths.output)
            job.forget()
    for writer in writers:
        if writer is not None:
            writer.close(keep=keep)
    if keep:
        job.close()
    else:
        job.remove()


def _assemble(
    setup: PruneSetup,
    job: Job,
    output: BlockWriter,
    saved: StatisticsWriter | None,
    progress: Progress,
    stop: StopFlag,
    within: ExitStack,
) -> PruneContext:
    """Return the context of the run; `within` holds what is to be closed."""
    scope, request, choices = setup.scope, setup.scope.request, setup.plan.choices
    checkpoint, streamed = scope.model.checkpoint, scope.model.streamed
    samples_NT, held_out_NT = scope.split(setup.samples.tokens_NT)
    in_host = setup.plan.host_spill_bytes
    store = within.enter_context(open_store(setup.paths.work_folder, in_host, job.start_over))
    store.adopt(job.stored())
    job.remove_unlisted()
    offload = within.enter_context(Offload(store, streamed.device, progress, choices.behind_bytes))
    # Gradient magnitudes are held in memory where no step writes any.
    in_memory = all(key.is_per_sample for step in setup.table for key in step.writes)
    precision = scope.magnitude_precision
    run = PruneContext(
        model=streamed,
        checkpoint=checkpoint,
        tokens=samples_NT.split(1),
        held_out=held_out_NT[:, None].unbind(),
        samples=SampleSet(len(samples_NT), scaled=scope.loss_scale > 1),
        table=setup.table,
        done=steps_done(setup.table, len(job.entries)),
        loader=BlockLoader(
            checkpoint, streamed, progress, scope.weights, choices, request.resident_kind
        ),
        offload=offload,
        progress=progress,
        schedule=scope.work.schedule,
        choices=choices,
        statistics=scope.statistics,
        loss_scale=scope.loss_scale,
        durable=not in_host,
        device_name=device_name(streamed.device),
        job=job,
        store=store,
        gradients=GradientStore(offload, choices, in_memory=in_memory),
        output=output,
        pruner=BlockPruner(
            scope.method, scope.patterns, request.options, streamed.device, stop=stop
        ),
        taken=TakenStatistics(
            statistics=scope.taken, folder=scope.saved, precision=precision, device=streamed.device
        ),
        search=OptionSearch(scope.candidates),
        saver=None
        if saved is None
        else StatisticsSaver(writer=saved, statistics=scope.statistics, precision=precision),
    )
    within.callback(run.close)
    if scope.saved is not None and scope.work.schedule.needs_samples:
        # What a run that measures all has dropped before its prune sweep.
        earlier = [one for one in scope.saved.manifest["dropped_samples"] if one["pass"] != "prune"]
        run.samples.restore({"dropped_samples": earlier, "weakened_samples": []})
    _restore(run, job)
    return run


def _restore(run: PruneContext, job: Job) -> None:
    durable = (step for step in run.table if step.durable)
    for step, entry in zip(durable, job.entries, strict=False):
        assert (entry["stage"], entry["block"]) == (step.stage, step.block), entry
        run.pruner.restore(entry)
        run.samples.restore(entry)
        run.losses += entry["losses"]
        if entry["candidate_losses"]:
            run.choose(entry["candidate_losses"])
        run.progress.restore(entry["stage"], entry["seconds"])


def _files(job: Job, kind: Literal["shards", "statistics"]) -> dict[str, Any]:
    """Return the files of a kind that earlier attempts have written, as last noted."""
    return {name: file for entry in job.entries for name, file in entry[kind].items()}
