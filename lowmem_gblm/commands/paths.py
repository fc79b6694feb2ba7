"""The folders of a prune run: where they are, and whether the run may write and remove them."""

from dataclasses import dataclass
from pathlib import Path

from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import RequestError
from lowmem_gblm.storage.in_place import check_confirmed
from lowmem_gblm.storage.job_state import forget_finished
from lowmem_gblm.storage.pending_folder import check_absent


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The folders of one run.

    Attributes:
        output: Where the pruned model will be; in place, the model folder.
        work_folder: What is stored between steps, and the journal; in `work_dir`, or beside output.
        partial: Where the output is written until it is complete; unused in place.
    """

    output: Path
    work_folder: Path
    partial: Path
    in_place: bool

    @property
    def written(self) -> list[Path]:
        """Return the folders that take disk space: the work folder, and the output if it is new."""
        return [self.work_folder, *([] if self.in_place else [self.output])]


def paths_of(request: PruneRequest) -> Paths:
    """Return the folders that a request means; they need not exist.

    In place every name of the model folder leads to the same path. A plan without an output is for
    one in the current folder. The paths end with a name, as others are derived from it.
    """
    folder = Path(request.model) if request.in_place else request.output or Path("pruned")
    if request.in_place or folder.name in ("", ".."):
        folder = folder.resolve()
    return Paths(
        output=folder,
        work_folder=(request.work_dir or folder.parent) / f"{folder.name}.work",
        partial=folder.with_name(f"{folder.name}.partial") if folder.name else folder,
        in_place=request.in_place,
    )


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
    return paths


def check_apart(request: PruneRequest, paths: Paths) -> None:
    """Raise `RequestError` if the run would remove a folder that it reads or makes."""
    output, work, partial = paths.output, paths.work_folder, paths.partial
    needed = {"MODEL": request.model, "the calibration text": request.calibration_text}
    # A name that is nowhere here is that of the Hub, or of a text.
    places = {what: Path(name) for what, name in needed.items() if Path(name).exists()}
    inside = [(what, place, work) for what, place in {**places, "OUTPUT": output}.items()]
    if not paths.in_place:
        inside += [(what, place, partial) for what, place in places.items()]
        inside += [("the work folder", work, one) for one in (output, partial)]
    for what, place, folder in inside:
        if _resolved(place).is_relative_to(_resolved(folder)):
            raise RequestError(
                f"{what} is {place}, which must not lie in {folder}: that is made and removed by "
                f"the run. Choose another OUTPUT or --work-dir"
            )


def _resolved(path: Path) -> Path:
    """Return the path with links followed; as it is where they lead in a circle."""
    try:
        return path.resolve()
    except RuntimeError:
        return path.absolute()
