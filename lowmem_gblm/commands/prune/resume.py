"""What earlier runs have left: a job to resume, or the complete result."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.paths import paths_of
from lowmem_gblm.commands.prune.identity import identity, recorded_identity
from lowmem_gblm.commands.prune.scope import draw_samples, prune_scope
from lowmem_gblm.commands.request import PruneRequest, request_from_json
from lowmem_gblm.commands.texts import IN_MEMORY, InMemory
from lowmem_gblm.errors import JobError
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.options import checked_options, options
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.job_state import differences, forget_finished, read_description
from lowmem_gblm.storage.kept_samples import kept_samples


def find_job(folder: Path, **given: Any) -> PruneRequest:
    """Return the request that resumes the interrupted job of an OUTPUT.work folder.

    Options of `MAY_CHANGE` that are `given`, and no defaults, replace those of the interrupted run.
    """
    found = read_description(folder)
    if found is None:
        raise JobError(f"{folder} holds no job: give the OUTPUT.work folder of an interrupted run")
    defaults = {one.name: one.default for one in options(PruneRequest)}
    asked = checked_options(PruneRequest, given)
    changed = {name: value for name, value in asked.items() if value != defaults[name]}
    request = replace(request_from_json(found["request"]), **changed)
    if request.calibration == IN_MEMORY:
        tokens_NT = kept_samples(folder)
        # A job that needs no samples keeps none.
        samples = InMemory(tokens_NT=tokens_NT) if len(tokens_NT) else IN_MEMORY
        request = replace(request, calibration=samples)
    place, name = folder.absolute().parent, paths_of(request).work_folder.name
    if folder.absolute().name != name:
        raise JobError(f"{folder} was renamed: call it {name} again, as the job in it does")
    if request.work_dir is None:
        # Who moves a work folder moves what lies beside it, too.
        beside = place / paths_of(request).output.name
        moved: dict[str, Any] = {"model": str(beside)} if request.in_place else {"output": beside}
        saved, former = request.save_statistics, Path(found["folder"]).parent
        if saved is not None and saved.parent == former:
            moved["save_statistics"] = place / saved.name
        request = replace(request, **moved)
    model = Path(request.model)
    if model.is_absolute() and not model.exists():
        how = "move it back" if request.in_place else "give the prune command with its new place"
        raise JobError(f"the model {model} of the job in {folder} is not there any more: {how}")
    return request if request.work_dir is None else replace(request, work_dir=place)


def find_finished(request: PruneRequest) -> dict[str, Any] | None:
    """Return the content of OUTPUT/pruning.json, if `prune` has made that OUTPUT already.

    Where another result is there, a `JobError` names every difference.
    """
    paths = paths_of(request)
    if not (paths.output / RECORD).is_file():
        return None
    forget_finished(paths.output, paths.work_folder)
    made: dict[str, Any] = read_json(paths.output / RECORD)
    check_made_by(request, made)
    return made


def check_made_by(request: PruneRequest, made: Mapping[str, Any]) -> None:
    """Raise `JobError`, naming every difference, unless a request gives what a record describes."""
    paths = paths_of(request)
    scope = prune_scope(request, open_model(request.model, request))
    asked = identity(scope, paths, draw_samples(scope).tokens_NT, None)
    # Texts are known by their tokens and models by their bytes, wherever they lie.
    del asked["calibration"], asked["source_pruned"]
    # Statistics that are saved change nothing, nor do taken ones, unless they were rounded.
    del asked["save_statistics"], asked["statistics_dtype"]
    if (made.get("statistics") or {}).get("taken_rounded_to") == []:
        del asked["statistics_taken"]
    if request.accept_other_rounding:
        del asked["device"]
    found = differences(recorded_identity(made, asked), asked)
    if found:
        there = "move it away, or " if paths.output.exists() else ""
        raise JobError(
            f"{paths.output} was made otherwise ({'; '.join(found.values())}): {there}choose "
            f"another place"
        )
