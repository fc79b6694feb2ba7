"""Tasks of lm-evaluation-harness: their requests as rows to be scored, and their results."""

import fnmatch
import io
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from lowmem_gblm.commands.request import EvalRequest
from lowmem_gblm.errors import LowmemGblmError, NonFiniteError, RequestError, first_line, shown
from lowmem_gblm.model.open_model import OpenModel
from lowmem_gblm.storage.hub import offline_if_unreachable
from lowmem_gblm.sweeps.batches import Row, Score

_PACKAGE = "lm_eval"
_VERSIONS = ">=0.4.12,<0.5"
_INSTALL = "pip install 'lowmem-gblm[eval]'"
# What of the harness's result is kept, as it is.
_KEPT = (
    "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
    "n-samples",
)  # fmt: skip


class TaskSuite:
    """The tasks that were asked for.

    Attributes:
        rows: The rows that all requests of all tasks need.
    """

    def __init__(self, request: EvalRequest, opened: OpenModel) -> None:
        self._version = _checked_version()
        self._limit = request.limit
        with _quiet():
            from lowmem_gblm.commands.harness import StreamedLM

            _seed()
            self._model = StreamedLM(opened, request)
            with offline_if_unreachable():
                self._tasks = _load(request)
                requests = _requests(self._tasks["tasks"], request.limit)
            self.rows = self._model.rows(requests)

    def result(self, scores: Mapping[Row, Score]) -> dict[str, Any]:
        """Return what the harness makes of the scores, in its own shape, and its version.

        Raises:
            NonFiniteError: The log-probability of an answer is NaN.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.utils import handle_non_serializable

        undefined = sum(math.isnan(scores[row].log_probability) for row in self.rows)
        if undefined:
            raise NonFiniteError(
                f"{undefined} of {len(self.rows)} answers have no log-probability: it is NaN"
            )
        self._model.scores = dict(scores)
        with _quiet(), _explained("the tasks cannot be judged"):
            found = evaluate(self._model, self._tasks, limit=self._limit, log_samples=False)
        kept = {name: found[name] for name in _KEPT if name in found}
        plain: dict[str, Any] = json.loads(json.dumps(kept, default=handle_non_serializable))
        return plain | {"lm_eval_version": self._version}


def _checked_version() -> str:
    """Return the version of lm-evaluation-harness; raise `RequestError` if there is none to use."""
    try:
        version = metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise RequestError(f"--tasks needs lm-evaluation-harness: {_INSTALL}") from None
    if version not in SpecifierSet(_VERSIONS):
        raise RequestError(
            f"--tasks needs lm-evaluation-harness {_VERSIONS}, {version} is installed: {_INSTALL}"
        )
    return version


def _load(request: EvalRequest) -> dict[str, Any]:
    """Return the tasks and groups as the harness loads them, with the number of examples set."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    manager = _manager(request)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in _matching(request.tasks, manager.all_tasks):
        with _explained(f"the task {name} cannot be loaded"):
            for kind, found in manager.load(name).items():
                loaded[kind].update(found)
    for task in loaded["tasks"].values():
        # A task that sets 0 itself has no examples to give, as in the harness.
        own = task.get_config("num_fewshot")
        if own != 0:
            asked = own if request.num_fewshot is None else request.num_fewshot
            task.set_config("num_fewshot", asked or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def _manager(request: EvalRequest) -> Any:
    """Return the harness's index of tasks; its own tasks are in it if they are needed.

    They are 15,000, and reading them takes 10 seconds.
    """
    from lm_eval.tasks import TaskManager

    folder = request.include_path
    if folder is None:
        return TaskManager()
    if not Path(folder).is_dir():
        raise RequestError(f"--include-path {folder} is not a folder")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # Groups, tags and globs may mean the harness's own tasks, too.
    if set(request.tasks) <= set(manager.all_subtasks):
        return manager
    return TaskManager(include_path=str(folder))


def _matching(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the known names that are asked for, by name or by glob."""
    found: dict[str, None] = {}
    for name in asked:
        matches = fnmatch.filter(known, name)
        if not matches:
            near = get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see lm_eval ls tasks"
            raise RequestError(f"there is no task {shown(name)!r}: {hint}")
        found |= dict.fromkeys(matches)
    return list(found)


def _requests(tasks: Mapping[str, Any], limit: int | None) -> list[Any]:
    """Return the requests of all tasks, which `evaluate` of the harness then need not make."""
    requests = []
    for name, task in tasks.items():
        with _explained(f"the requests of the task {name} cannot be made"):
            task.build_all_requests(limit=limit)
        task.build_all_requests = _do_nothing
        requests += task.instances
    return requests


def _do_nothing(**ignored: Any) -> None:
    """Do nothing."""


def _seed() -> None:
    """Seed what tasks may draw with, as the harness does."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


@contextmanager
def _explained(sentence: str) -> Iterator[None]:
    """Run the body; an error of a task, or of its data set, becomes a sentence."""
    try:
        yield
    except LowmemGblmError:
        raise
    # The code of tasks may raise anything.
    except Exception as error:
        raise RequestError(
            f"{sentence}: {first_line(error)}. Without a network, a task file in a folder given "
            f"with --include-path can read local data"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Run the body without what the harness prints, logs and counts on the terminal."""
    nothing = io.StringIO()
    with redirect_stdout(nothing), redirect_stderr(nothing):
        yield
