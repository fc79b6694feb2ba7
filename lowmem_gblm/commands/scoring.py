"""The sweep of an evaluation: rows of tokens through a streamed model, once for all of them."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.causes import cause_of
from lowmem_gblm.commands.estimate import budget_of, limited, work_of
from lowmem_gblm.commands.prune.identity import computing_versions, source_fingerprints
from lowmem_gblm.errors import BudgetError, LowmemGblmError
from lowmem_gblm.model.block_loader import BlockLoader
from lowmem_gblm.model.open_model import OpenModel, check_tokens, open_model
from lowmem_gblm.model.prunable import PrunableWeight, prunable_weights
from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.planning.plan import Budget, Plan
from lowmem_gblm.planning.planner import plan
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.planning.schedule import EVALUATION
from lowmem_gblm.planning.sizes import Choices, Workload, compiles_every_shape
from lowmem_gblm.planning.steps import step_table, steps_done
from lowmem_gblm.runtime import machine, memory
from lowmem_gblm.runtime.accelerator import device_name, is_accelerator, peak_bytes
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.runtime.signals import StopFlag, stop_on_signals
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.disk_errors import explained, is_trouble
from lowmem_gblm.storage.evaluation_job import EvaluationJob, clear_away
from lowmem_gblm.storage.in_place_marker import check_complete
from lowmem_gblm.storage.locking import model_lock, size_on_disk
from lowmem_gblm.storage.raw_io import file_pieces, summary
from lowmem_gblm.sweeps.batches import TOKENS_AT_ONCE, Batch, Row, Score, pack
from lowmem_gblm.sweeps.boundaries import embed
from lowmem_gblm.sweeps.context import SweepContext
from lowmem_gblm.sweeps.dense import dense_sweep, row_scores
from lowmem_gblm.sweeps.offload import Offload, open_store
from lowmem_gblm.sweeps.prefix_check import PrefixNotShared
from lowmem_gblm.sweeps.prefix_groups import remembered_numbers
from lowmem_gblm.sweeps.sample_set import SampleSet

_ON_DISK = Path("/var/tmp")
# The version of how rows become batches: what an earlier one has begun is not resumed.
_BATCHING = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """The scores of all rows, and the seconds and the memory that they have taken."""

    scores: dict[Row, Score]
    seconds: dict[str, float]
    memory: dict[str, int]


@contextmanager
def model_to_score(model: str, resources: Resources) -> Iterator[OpenModel]:
    """Run the body with an opened model, which no other process overwrites meanwhile."""
    memory.reset_host_peak()
    memory.settle_allocator()
    opened = open_model(model, resources)
    with model_lock(opened.folder, alone=False):
        check_complete(opened.folder)
        yield opened


def score(
    opened: OpenModel,
    resources: Resources,
    rows: Sequence[Row],
    listener: Listener | None = None,
    *,
    packed: bool,
) -> Scored:
    """Score rows in one sweep over the blocks; `packed`, several of them at once.

    Blocks that an interrupted call has finished are not computed again by the same call.

    Raises:
        NonFiniteError: A batch has left a block non-finite.
        DiskFull: The disk that hidden states are stored on has become full.
        JobError: What an interrupted call has left is damaged.
    """
    identity = _identity(opened, resources, rows, packed=packed)
    with _kept_or_removed(_work_folder(resources), identity) as job:
        try:
            setup = _planned(opened, resources, rows, job, packed=packed, shares_prefixes=packed)
            return _swept(setup, job, listener)
        except PrefixNotShared as error:
            _log.info(f"note: every answer is computed with its own context: {error}")
        job.discard_steps()
        opened.streamed.forget_calls()
        setup = _planned(opened, resources, rows, job, packed=packed, shares_prefixes=False)
        return _swept(setup, job, listener)


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What a sweep needs to know, and how it is done.

    Attributes:
        tokens_at_once: The most tokens of a batch that is not a single line.
        shares_prefixes: Whether a prefix of several rows may be computed once.
    """

    opened: OpenModel
    resources: Resources
    weights: Sequence[list[PrunableWeight]]
    batches: Sequence[Batch]
    packed: bool
    tokens_at_once: int
    shares_prefixes: bool
    work: Workload
    budget: Budget
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """Return what a resumed evaluation keeps to."""
        return {
            "tokens_at_once": self.tokens_at_once,
            "shares_prefixes": self.shares_prefixes,
            "choices": asdict(self.plan.choices),
        }


def _swept(setup: _Setup, job: EvaluationJob, listener: Listener | None) -> Scored:
    """Return the scores of all rows, in one sweep; raise `PrefixNotShared` where that shows."""
    opened, stop = setup.opened, StopFlag()
    check_tokens(opened, chain.from_iterable(batch.ids() for batch in setup.batches))
    progress = Progress(_stages(setup), listener, stop)
    with (
        stop_on_signals(stop),
        _told_of_its_disk(setup.plan, job.folder.parent),
        limited(setup.budget, setup.plan, opened.streamed.device, stop),
        _started_or_resumed(setup, job, progress) as run,
    ):
        embed(run)
        dense_sweep(run)
        scores = row_scores(run, setup.batches)
    return Scored(
        scores,
        seconds={**progress.seconds, "total": progress.total_seconds()},
        memory={
            "host_peak_bytes": memory.host_peak_bytes(),
            "host_planned_bytes": setup.plan.predicted.host_bytes,
            "gpu_peak_bytes": peak_bytes(opened.streamed.device),
            "gpu_planned_bytes": setup.plan.predicted.gpu_bytes,
        },
    )


def _identity(
    opened: OpenModel, resources: Resources, rows: Sequence[Row], *, packed: bool
) -> dict[str, Any]:
    """Return what, if it were different, would give other hidden states."""
    asked, record = hashlib.sha256(), opened.folder / RECORD
    for row in rows:
        asked.update(f"{len(row)} {len(row.labels)} {row.first} ".encode())
        asked.update(row.tokens)
        asked.update(row.labels)
    trusted = resources.trust_remote_code
    return {
        **source_fingerprints(opened.checkpoint, trusted=trusted),
        "source_record": summary(file_pieces(record)) if record.is_file() else None,
        "rows": asked.hexdigest(),
        "packed": packed,
        "batching": _BATCHING,
        "device": device_name(opened.streamed.device),
        "dtype": str(opened.streamed.dtype),
        "compute_weights": resources.compute_weights,
        **computing_versions(),
    }


def _planned(
    opened: OpenModel,
    resources: Resources,
    rows: Sequence[Row],
    job: EvaluationJob,
    *,
    packed: bool,
    shares_prefixes: bool,
) -> _Setup:
    """Return the setup with the most tokens at once that fit the budget, or that were begun with.

    What an earlier attempt has written counts as free.
    """
    longest = max(map(len, rows))
    tokens_at_once, kept = TOKENS_AT_ONCE if packed else 0, None
    if job.kept is not None:
        tokens_at_once, kept = job.kept["tokens_at_once"], Choices(**job.kept["choices"])
        shares_prefixes = job.kept["shares_prefixes"]
    budget = budget_of(resources, opened.streamed.device, [job.folder])
    if resources.disk is None and budget.disk_bytes is not None:
        budget = replace(budget, disk_bytes=budget.disk_bytes + size_on_disk(job.folder))
    weights = prunable_weights(opened.checkpoint, opened.streamed)
    sharing = _longest_sharing(opened, longest) if shares_prefixes else 0
    while True:
        batches = pack(rows, tokens_at_once, sharing=sharing)
        layouts = {batch.layout for batch in batches if batch.layout is not None}
        tokens = max(batch.tokens_BT.numel() for batch in batches)
        work = work_of(
            opened, weights, EVALUATION, resources, nsamples=len(batches), seqlen=tokens,
            row_length=batches[0].tokens_BT.shape[1],
            samples_option="a smaller --limit" if packed else "--windows {}",
        )  # fmt: skip
        remembered = remembered_numbers(layouts, work.sizes.hidden_size // work.sizes.heads)
        work = replace(work, layout_bytes=remembered * work.itemsize)
        memory.settle_allocator(work.boundary_bytes)
        try:
            found = plan(work, budget, kept=kept)
        except BudgetError:
            if tokens == longest or kept is not None:
                raise
            tokens_at_once //= 2
        else:
            return _Setup(
                opened=opened, resources=resources, weights=weights, batches=batches,
                packed=packed, tokens_at_once=tokens_at_once, shares_prefixes=shares_prefixes,
                work=work, budget=budget, plan=found,
            )  # fmt: skip


def _longest_sharing(opened: OpenModel, longest: int) -> int:
    """Return the most tokens of a row that may share its prefix; 0 if none may."""
    streamed = opened.streamed
    # Layouts have a hundred numbers of tokens.
    if compiles_every_shape(is_accelerator(streamed.device), streamed.dtype.itemsize):
        return 0
    return min(longest, streamed.window or longest)


def _stages(setup: _Setup) -> list[Stage]:
    depth = setup.opened.streamed.depth
    return [
        Stage(name="embed", steps=len(setup.batches), cost=0),
        Stage(name="dense", steps=depth, cost=1),
        Stage(name="head", steps=len(setup.batches), cost=1 / depth),
    ]


@contextmanager
def _started_or_resumed(
    setup: _Setup, job: EvaluationJob, progress: Progress
) -> Iterator[SweepContext]:
    """Run the body with what the sweep works with, new or as an earlier attempt left it."""
    opened, choices, in_host = setup.opened, setup.plan.choices, setup.plan.host_spill_bytes
    checkpoint, streamed = opened.checkpoint, opened.streamed
    kind = setup.resources.resident_kind
    weights, table = setup.weights if kind else None, step_table(setup.work, choices)
    what = "batch" if setup.packed else "window"
    job.begin(str(checkpoint.folder), setup.as_json())
    with (
        open_store(job.folder, in_host, job.start_over) as store,
        Offload(store, streamed.device, progress, choices.behind_bytes) as offload,
    ):
        store.adopt(job.stored())
        for entry in job.entries:
            progress.restore(entry["stage"], entry["seconds"])
        run = SweepContext(
            model=streamed,
            checkpoint=checkpoint,
            tokens=[batch.tokens_BT for batch in setup.batches],
            layouts={n: one.layout for n, one in enumerate(setup.batches) if one.layout},
            routed=setup.work.sizes.active_fraction < 1,
            samples=SampleSet(len(setup.batches), tolerated=0, what=what),
            table=table,
            done=steps_done(table, len(job.entries)),
            durable=not in_host,
            job=job,
            store=store,
            loader=BlockLoader(checkpoint, streamed, progress, weights, choices, kind),
            offload=offload,
            progress=progress,
        )
        with closing(run):
            yield run


@contextmanager
def _kept_or_removed(parent: Path, identity: Mapping[str, Any]) -> Iterator[EvaluationJob]:
    """Run the body with the job of an evaluation, which is removed when that is over.

    Whatever ends the body early, what is done is kept, and the error says where.
    """
    job = EvaluationJob(parent, identity)
    try:
        clear_away(parent)
        yield job
    except BaseException as error:
        told = _told(error, job)
        job.close()
        if told is not None:
            raise told from (None if isinstance(error, type(told)) else error)
        raise
    job.remove()


def _told(error: BaseException, job: EvaluationJob) -> LowmemGblmError | None:
    """Return the error to raise instead of the one that ends an evaluation, or None."""
    cause, told = cause_of(error)
    kept = f"What is done is kept in {job.folder}"
    if not job.entries or cause == "job error":
        return told if told is not error else None
    if told is None:
        error.add_note(kept)
        return None
    return type(told)(
        f"{told}. {kept}: the same command resumes it; to discard it, remove that folder"
    )


def _work_folder(resources: Resources) -> Path:
    """Return where boundaries are stored; by default /var/tmp, as /tmp is often in memory."""
    if resources.work_dir is not None:
        return resources.work_dir
    return _ON_DISK if os.access(_ON_DISK, os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def _told_of_its_disk(planned: Plan, folder: Path) -> Iterator[None]:
    """Run the body; a disk that is full or failing becomes a sentence."""
    try:
        yield
    except OSError as error:
        if not is_trouble(error):
            raise
        free = gibibytes(machine.free_disk_bytes(folder))
        needs = f"{gibibytes(planned.spill_bytes)} are needed in {folder} and {free} are free"
        what_to_do = "give the same command again, or give another --work-dir"
        raise explained(error, needs, what_to_do) from error
