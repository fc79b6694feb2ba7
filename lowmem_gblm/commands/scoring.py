"""The sweep of an evaluation: rows of tokens through a streamed model, once for all of them."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lowmem_gblm.commands.estimate import budget_of, limited, work_of
from lowmem_gblm.errors import BudgetError, JobError
from lowmem_gblm.model.block_loader import BlockLoader
from lowmem_gblm.model.open_model import OpenModel, check_tokens, open_model
from lowmem_gblm.model.prunable import PrunableWeight, prunable_weights
from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.planning.plan import Budget, Plan
from lowmem_gblm.planning.planner import plan
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.planning.schedule import EVALUATION
from lowmem_gblm.planning.steps import Layout, steps
from lowmem_gblm.runtime import machine, memory
from lowmem_gblm.runtime.accelerator import peak_bytes
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.runtime.signals import StopFlag, stop_on_signals
from lowmem_gblm.storage.disk_errors import explained, is_trouble
from lowmem_gblm.storage.in_place_marker import check_complete
from lowmem_gblm.storage.locking import OwnedFolder, model_lock, owner_of
from lowmem_gblm.sweeps.batches import TOKENS_AT_ONCE, Batch, Row, Score, pack
from lowmem_gblm.sweeps.boundaries import embed
from lowmem_gblm.sweeps.context import SweepContext
from lowmem_gblm.sweeps.dense import dense_sweep, row_scores
from lowmem_gblm.sweeps.offload import Offload, open_store
from lowmem_gblm.sweeps.sample_set import SampleSet

_ON_DISK = Path("/var/tmp")
_PREFIX = "lowmem-gblm-"
_OWNER = "eval"


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

    Raises:
        NonFiniteError: A batch has left a block non-finite.
        DiskFull: The disk that hidden states are stored on has become full.
    """
    checkpoint, streamed = opened.checkpoint, opened.streamed
    folder = _work_folder(resources)
    _remove_left_behind(folder)
    weights = prunable_weights(checkpoint, streamed)
    budget = budget_of(resources, streamed.device, [folder])
    batches, planned = _plan(opened, weights, resources, rows, budget, packed=packed)
    check_tokens(opened, chain.from_iterable(batch.ids() for batch in batches))
    stop = StopFlag()
    progress = Progress(
        [
            Stage(name="embed", steps=len(batches), cost=0),
            Stage(name="dense", steps=streamed.depth, cost=1),
            Stage(name="head", steps=len(batches), cost=1 / streamed.depth),
        ],
        listener,
        stop,
    )
    with (
        stop_on_signals(stop),
        _told_of_its_disk(planned, folder),
        limited(budget, planned, streamed.device, stop),
        _folder(folder) as own,
    ):
        what = "batch" if packed else "window"
        scores = _sweep(opened, resources, weights, planned, batches, what, own, progress)
    return Scored(
        scores,
        seconds={**progress.seconds, "total": progress.total_seconds()},
        memory={
            "host_peak_bytes": memory.host_peak_bytes(),
            "gpu_peak_bytes": peak_bytes(streamed.device),
        },
    )


def _plan(
    opened: OpenModel,
    weights: Sequence[list[PrunableWeight]],
    resources: Resources,
    rows: Sequence[Row],
    budget: Budget,
    *,
    packed: bool,
) -> tuple[list[Batch], Plan]:
    """Return the batches with the most tokens that fit the budget, and their plan."""
    longest = max(map(len, rows))
    tokens_at_once = max(longest, TOKENS_AT_ONCE if packed else 0)
    fewer = "a smaller --limit" if packed else "--windows {}"
    while True:
        batches = pack(rows, tokens_at_once)
        tokens = max(batch.tokens_BT.numel() for batch in batches)
        work = work_of(
            opened, weights, EVALUATION, resources, nsamples=len(batches), seqlen=tokens,
            row_length=longest, samples_option=fewer,
        )  # fmt: skip
        memory.settle_allocator(work.boundary_bytes)
        try:
            return batches, plan(work, budget)
        except BudgetError:
            if tokens == longest:
                raise
        tokens_at_once = max(longest, tokens_at_once // 2)


def _sweep(
    opened: OpenModel,
    resources: Resources,
    weights: Sequence[list[PrunableWeight]],
    planned: Plan,
    batches: Sequence[Batch],
    what: str,
    folder: Path,
    progress: Progress,
) -> dict[Row, Score]:
    checkpoint, streamed, choices = opened.checkpoint, opened.streamed, planned.choices
    kind = resources.resident_kind
    with (
        open_store(folder, planned.host_spill_bytes) as store,
        Offload(store, streamed.device, progress, choices.behind_bytes) as offload,
    ):
        run = SweepContext(
            model=streamed,
            checkpoint=checkpoint,
            tokens=[batch.tokens_BT for batch in batches],
            samples=SampleSet(len(batches), tolerated=0, what=what),
            table=steps(EVALUATION, Layout(depth=streamed.depth)),
            loader=BlockLoader(
                checkpoint, streamed, progress, weights if kind else None, choices, kind
            ),
            offload=offload,
            progress=progress,
        )
        embed(run)
        dense_sweep(run)
        return row_scores(run, batches)


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


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """Run the body with a new folder, which is removed afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    own = OwnedFolder(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)), _OWNER)
    try:
        yield own.path
    finally:
        own.remove()


def _remove_left_behind(parent: Path) -> None:
    """Remove folders of this user whose process was killed: they may hold gigabytes."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # Jobs may have folders of like names, and a folder may be about to be marked: both stay.
        with suppress(OSError, JobError):
            if folder.lstat().st_uid == os.getuid() and owner_of(folder) == _OWNER:
                OwnedFolder(folder, _OWNER).remove()
