"""A comparison on one page: prune with every method of a grid, measure each result, one table.

The dense model comes first. Then, seed by seed, every run of the grid is pruned and measured. What
is finished is noted in `comparison.json` (`ledger`), so that an interrupted comparison resumes with
the run that was under way. Runs of a seed share what may be shared of their statistics (`sharing`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.card import show_results
from lowmem_gblm.commands.compare.grid import Cell, Grid, cells, goal_of
from lowmem_gblm.commands.compare.ledger import Ledger, comparison_folder
from lowmem_gblm.commands.compare.measures import asked_for, evaluations, measure
from lowmem_gblm.commands.compare.rows import quality, table_rows
from lowmem_gblm.commands.compare.sharing import SharedStatistics, in_order
from lowmem_gblm.commands.prune.identity import source_bytes, versions
from lowmem_gblm.commands.prune.pipeline import prune
from lowmem_gblm.commands.prune.resume import check_made_by, find_finished
from lowmem_gblm.commands.request import EvalRequest, PruneRequest
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.runtime.accelerator import device_name
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.atomic import publish_json
from lowmem_gblm.storage.job_state import remove_finished
from lowmem_gblm.storage.pending_folder import check_absent

Announce = Callable[[str], None]
# Beside those that a user has saved; `report` reads all.
_EVALUATION = "evaluation-compare.json"


def compare(
    shared: PruneRequest,
    grid: Grid,
    folder: Path,
    evaluation: Mapping[str, Any],
    method_options: Mapping[str, Any],
    listener: Listener | None,
    announce: Announce = lambda text: None,
) -> list[dict[str, Any]]:
    """Prune a model in every way of a grid, measure each result, and return the rows of the table.

    Called again after an interruption it resumes: what is pruned is only measured, what is measured
    is not measured again. An output that is something else raises a `JobError` before anything is
    done.

    Args:
        shared: The options of all runs; what the grid varies is replaced.
        folder: Folder for the outputs and for `comparison.json`.
        evaluation: Values of `grid.EVALUATION`; the other options are those of `shared`.
        method_options: Options of methods, one value or several, for those that have them.
        announce: Called with a text about what begins.
    """
    table = cells(shared, grid, method_options, folder)
    runs = in_order([run for cell in table for run in cell.runs])
    requests = evaluations(shared, evaluation)
    with comparison_folder(folder):
        comparison = _Comparison(
            ledger=Ledger(folder),
            statistics=SharedStatistics(folder / "statistics"),
            requests=requests,
            asked=asked_for(requests),
            runs=runs,
            keep=grid.keep,
            listener=listener,
            announce=announce,
        )
        finished = {_name(run): comparison.finished(run) for run in runs}
        dense = comparison.measure_dense(shared)
        for number, run in enumerate(runs):
            left = [one for one in runs[number + 1 :] if finished[_name(one)] is None]
            comparison.complete(run, finished[_name(run)], left)
            if not any(one.seed == run.seed for one in runs[number + 1 :]):
                comparison.statistics.remove(run.seed)
        return table_rows(dense, [(cell, comparison.noted(cell)) for cell in table])


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """A comparison that is under way."""

    ledger: Ledger
    statistics: SharedStatistics
    requests: Sequence[EvalRequest]
    asked: list[dict[str, Any]]
    runs: Sequence[PruneRequest]
    keep: str
    listener: Listener | None
    announce: Announce

    def finished(self, run: PruneRequest) -> dict[str, Any] | None:
        """Return the record of a run whose pruned model is there, or was and is not needed."""
        noted = self.ledger.run(_name(run))
        if noted.get("dropped"):
            record: dict[str, Any] = noted["record"]
            remove_finished(_output(run), record["job"])
            check_made_by(run, record)
            if self._is_measured(noted):
                return record
        found = find_finished(run)
        if found is None:
            check_absent(_output(run))
        return found

    def measure_dense(self, shared: PruneRequest) -> dict[str, Any]:
        """Return what is measured of the dense model."""
        opened = open_model(shared.model, shared)
        model = {
            "source_bytes": source_bytes(opened.checkpoint),
            "device": device_name(opened.streamed.device),
            "dtype": str(opened.streamed.dtype),
            **versions(),
        }
        noted = self.ledger.dense
        if noted.get("model") != model or not self._is_measured(noted):
            self.announce(f"dense: measuring {self._measures}")
            found = measure(self.requests, shared.model, self.listener)
            self.ledger.note_dense(model=model, evaluation=found)
        evaluation: dict[str, Any] = self.ledger.dense["evaluation"]
        return evaluation

    def complete(
        self, run: PruneRequest, record: dict[str, Any] | None, left: Sequence[PruneRequest]
    ) -> None:
        """Prune and measure what of a run is not done; `left` are later runs to be pruned."""
        name = _name(run)
        if record is None:
            self.announce(f"{name}: pruning")
            self.ledger.note(name, own=True, dropped=False, record={}, evaluation={})
            record = prune(self.statistics.shared(run, left), self.listener)
        else:
            self.announce(f"{name}: is pruned already")
        noted = self.ledger.run(name)
        job = noted.get("record", {}).get("job")
        if job != record["job"] or not self._is_measured(noted):
            self.announce(f"{name}: measuring {self._measures}")
            found = measure(self.requests, str(run.output), self.listener)
            publish_json(_output(run) / _EVALUATION, found, "what was measured", replaces=True)
            show_results(_output(run), record)
            # A user may have put another output there.
            own = noted.get("own", False) and job in (None, record["job"])
            self.ledger.note(name, own=own, dropped=False, record=record, evaluation=found)
        self._drop(run)

    def noted(self, cell: Cell) -> list[dict[str, Any]]:
        """Return what is noted of the runs of a cell, and the output of each that has one."""
        found = [(run, self.ledger.run(_name(run))) for run in cell.runs]
        return [
            {**noted, "seed": run.seed, "output": None if noted.get("dropped") else str(run.output)}
            for run, noted in found
        ]

    @property
    def _measures(self) -> str:
        perplexity = any(one.measures_text for one in self.requests)
        tasks = any(one.tasks for one in self.requests)
        return " and ".join(["perplexity"] * perplexity + ["tasks"] * tasks)

    def _is_measured(self, noted: Mapping[str, Any]) -> bool:
        return bool(noted.get("evaluation", {}).get("asked") == self.asked)

    def _drop(self, run: PruneRequest) -> None:
        """Remove what is not to be kept of the outputs with the goal of a run."""
        if self.keep == "all":
            return
        alike = [one for one in self.runs if goal_of(one) == goal_of(run)]
        measured = [one for one in alike if self._is_measured(self.ledger.run(_name(one)))]
        best = min(measured, key=lambda one: quality(self.ledger.run(_name(one))["evaluation"]))
        for one in measured:
            noted = self.ledger.run(_name(one))
            if noted["own"] and not noted["dropped"] and (self.keep, one) != ("best", best):
                self.ledger.note(_name(one), dropped=True)
                remove_finished(_output(one), noted["record"]["job"])


def _output(run: PruneRequest) -> Path:
    assert run.output is not None, "cells give every run an output"
    return run.output


def _name(run: PruneRequest) -> str:
    return _output(run).name
