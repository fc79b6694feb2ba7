"""The folders of a prune run: where they are, and whether the run may write and remove them."""

from dataclasses import dataclass
from pathlib import Path

from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import RequestError
from lowmem_gblm.storage.in_place import check_confirmed
from lowmem_gblm.storage.job_state import forget_finished
from lowmem_gblm.storage.journal import has_steps
from lowmem_gblm.storage.pending_folder import check_absent, partial_folder


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The folders of one run.

    Attributes:
        output: Where the pruned model will be; in place, the model folder.
        work_folder: What is stored between steps, and the journal; in `work_dir`, or beside output.
        partial: Where the output is written until it is complete; unused in place.
        statistics: Where statistics are saved; None if none are.
    """

    output: Path
    work_folder: Path
    partial: Path
    in_place: bool
    statistics: Path | None

    @property
    def written(self) -> list[Path]:
        """Return the folders that take disk space, named as they are when they are complete."""
        made = [self.work_folder, *([] if self.in_place else [self.output])]
        return [*made, *([] if self.statistics is None else [self.statistics])]

    @property
    def unfinished(self) -> list[Path]:
        """Return where the run writes until all is complete."""
        made = [self.work_folder, *([] if self.in_place else [self.partial])]
        return [*made, *([] if self.statistics is None else [partial_folder(self.statistics)])]


def paths_of(request: PruneRequest) -> Paths:
    """Return the folders that a request means; they need not exist.

    In place every name of the model folder leads to the same path. A plan without an output is for
    one in the current folder. The paths end with a name, as others are derived from it.
    """
    folder = Path(request.model) if request.in_place else request.output or Path("pruned")
    folder = folder.resolve() if request.in_place else _with_a_name(folder)
    return Paths(
        output=folder,
        work_folder=(request.work_dir or folder.parent) / f"{folder.name}.work",
        partial=folder.with_name(f"{folder.name}.partial") if folder.name else folder,
        in_place=request.in_place,
        statistics=request.save_statistics and _with_a_name(request.save_statistics),
    )


def _with_a_name(folder: Path) -> Path:
    return folder.resolve() if folder.name in ("", "..") else folder


def check_paths(request: PruneRequest) -> Paths:
    """Return the folders of a run, if the run may write them; clear away a finished job."""
    paths = paths_of(request)
    check_apart(request, paths)
    if request.in_place:
        check_confirmed(request.model, confirmed=request.overwrite_my_only_copy)
    elif request.output is None:
        raise RequestError("prune needs an OUTPUT folder, or --in-place to overwrite MODEL itself")
    forget_finished(paths.output, paths.work_folder)
    if not request.in_place:
        check_absent(paths.output)
    if paths.statistics is not None and not has_steps(paths.work_folder):
        # A job that is resumed may have published them.
        check_absent(paths.statistics, "--save-statistics")
    return paths


def check_apart(request: PruneRequest, paths: Paths) -> None:
    """Raise `RequestError` if the run would remove a folder that it reads or makes."""
    needed = {"MODEL": request.model, "the calibration text": request.calibration_text}
    # A name that is nowhere here is that of the Hub, or of a text.
    places = {what: Path(name) for what, name in needed.items() if Path(name).exists()}
    if request.statistics is not None:
        places["--statistics"] = request.statistics
    # Where each will be, and where it is until it is complete.
    made = {"the work folder": (paths.work_folder, paths.work_folder)}
    if not paths.in_place:
        made["OUTPUT"] = paths.output, paths.partial
    if paths.statistics is not None:
        made["--save-statistics"] = paths.statistics, partial_folder(paths.statistics)
    inside = [(what, place, one) for what, place in places.items() for _, one in made.values()]
    inside += [
        (what, place, folder)
        for what, (place, _) in made.items()
        for other, folders in made.items()
        for folder in folders
        if other != what
    ]
    for what, place, folder in inside:
        if _resolved(place).is_relative_to(_resolved(folder)):
            raise RequestError(
                f"{what} is {place}, which must not lie in {folder}: that is made and removed by "
                f"the run. Choose another OUTPUT or --work-dir"
            )
    model, saved = places.get("MODEL"), paths.statistics
    if model is not None and saved is not None and _resolved(saved).is_relative_to(model.resolve()):
        raise RequestError(
            f"--save-statistics is {saved}, inside MODEL, whose files are copied to every output: "
            f"choose another place"
        )


def _resolved(path: Path) -> Path:
    """Return the path with links followed; as it is where they lead in a circle."""
    try:
        return path.resolve()
    except RuntimeError:
        return path.absolute()
