"""How a run ends: what of its job is kept, and what a user is told.

    done so far            interrupted   disk      device, numbers, model   job error   bug
    nothing                remove        remove    remove                   remove      remove
    finished steps         keep          keep      keep, how to resume      keep        keep, note
    weights overwritten    keep          keep      keep, how to resume,     keep,       keep, note
                                                   what is lost             what is lost

A job with finished steps is never removed: its cause may go away, as a device error does.
"""

from pathlib import Path
from typing import Literal

from lowmem_gblm.commands.causes import Cause, cause_of
from lowmem_gblm.commands.estimate import still_needed
from lowmem_gblm.commands.prune.setup import PruneSetup
from lowmem_gblm.errors import LowmemGblmError
from lowmem_gblm.storage.checkpoint.file_access import MARKER_FILE
from lowmem_gblm.storage.disk_errors import explained, to_resume, to_resume_or_discard

Done = Literal["nothing", "finished steps", "weights overwritten"]
Hint = Literal["resume", "lost"]

# What is said after the error. How to resume after an interruption or a disk is said elsewhere.
_HINTS: dict[tuple[Done, Cause], tuple[Hint, ...]] = {
    ("finished steps", "device, numbers, model"): ("resume",),
    ("finished steps", "bug"): ("resume",),
    ("weights overwritten", "device, numbers, model"): ("resume", "lost"),
    ("weights overwritten", "job error"): ("lost",),
    ("weights overwritten", "bug"): ("resume", "lost"),
}


def told_error(error: BaseException, done: Done, setup: PruneSetup) -> LowmemGblmError | None:
    """Return the error to raise instead of the one that ends a run, or None; a bug gets notes."""
    cause, told = cause_of(error)
    if cause == "disk" and isinstance(error, OSError):
        work_folder = setup.paths.work_folder
        needs = still_needed(setup.plan, setup.paths, Path(error.filename or work_folder))
        return explained(error, needs, to_resume(work_folder, kept=done != "nothing"))
    hints = [_said(hint, done, setup) for hint in _HINTS.get((done, cause), ())]
    if cause == "bug":
        for hint in hints:
            error.add_note(hint)
    if told is None or (told is error and not hints):
        return None
    return type(told)(". ".join([str(told), *hints]))


def _said(hint: Hint, done: Done, setup: PruneSetup) -> str:
    paths = setup.paths
    if hint == "lost":
        return (
            f"{paths.output} is partly pruned by now: if this cannot be mended, the model has to "
            f"be fetched anew"
        )
    marker = [paths.output / MARKER_FILE] if paths.in_place else []
    discarded = [] if done == "weights overwritten" else [*paths.unfinished, *marker]
    return to_resume_or_discard(paths.work_folder, discarded)
