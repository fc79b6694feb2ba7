"""Statistics that the runs of a comparison share: measured by the first that needs them.

They are saved in a folder of the comparison and removed when all runs of their seed are done.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lowmem_gblm.commands.paths import paths_of
from lowmem_gblm.commands.prune.reuse import serving_names
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.methods import find_method
from lowmem_gblm.storage.job_state import read_description
from lowmem_gblm.storage.journal import has_steps
from lowmem_gblm.storage.statistics_folder import (
    StatisticsFolder,
    holds_statistics,
    remove_statistics,
)
from lowmem_gblm.sweeps.statistics import needed_statistics


def in_order(runs: Sequence[PruneRequest]) -> list[PruneRequest]:
    """Return runs seed by seed; of a seed, those first that measure several statistics to share."""
    seeds = list(dict.fromkeys(run.seed for run in runs))
    return sorted(runs, key=lambda run: (seeds.index(run.seed), len(_serving(run)) < 2))


class SharedStatistics:
    """The statistics in a folder of the comparison."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def shared(self, request: PruneRequest, later: Iterable[PruneRequest]) -> PruneRequest:
        """Return the request of a run with what it takes of earlier runs, or saves for later ones.

        A run takes all or nothing of what serves it. A job that is resumed keeps to what it was
        begun with.
        """
        begun = self._begun(request)
        if begun is not None:
            return begun
        names = _serving(request)
        if not names:
            return request
        for folder in self._complete():
            manifest = StatisticsFolder(folder).manifest
            dense = {name for name, stream in manifest["streams"].items() if stream == "dense"}
            if names <= dense and manifest["calibration"]["seed"] == request.seed:
                return replace(request, statistics=folder)
        if not any(one.seed == request.seed and set() < _serving(one) <= names for one in later):
            return request
        saved = self._folder / (_prefix(request.seed) + "-".join(sorted(names)))
        # What is left of statistics that were being removed.
        remove_statistics(saved)
        return replace(request, save_statistics=saved)

    def remove(self, seed: int) -> None:
        """Remove the statistics of a seed."""
        for folder in self._folders():
            if folder.name.startswith(_prefix(seed)):
                remove_statistics(folder)
        with suppress(OSError):
            self._folder.rmdir()

    def _begun(self, request: PruneRequest) -> PruneRequest | None:
        """Return the request with the statistics of its unfinished job, or None if it has none."""
        work_folder = paths_of(request).work_folder
        begun = read_description(work_folder) if has_steps(work_folder) else None
        if begun is None:
            return None
        taken, saved = (
            folder and self._folder / Path(folder).name
            for folder in (begun["request"]["statistics"], begun["request"]["save_statistics"])
        )
        return replace(request, statistics=taken, save_statistics=saved)

    def _folders(self) -> Iterator[Path]:
        found = self._folder.iterdir() if self._folder.is_dir() else ()
        return (one for one in sorted(found) if one.is_dir() and one.suffix != ".partial")

    def _complete(self) -> Iterator[Path]:
        return filter(holds_statistics, self._folders())


def _prefix(seed: int) -> str:
    """Return how the names of the statistics of a seed begin."""
    return f"seed{seed}-"


def _serving(request: PruneRequest) -> set[str]:
    """Return the names of the statistics of a run that serve other runs exactly."""
    needs = find_method(request.method).needs_with(request.options)
    return set(serving_names(request, needed_statistics(needs)))
