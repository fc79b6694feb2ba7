"""The grid of a comparison: its cells, the runs of a cell, and the names of their outputs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.method_options import no_option
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import find_method, option_owners
from lowmem_gblm.methods.masks import NofM, as_pattern, as_sparsity
from lowmem_gblm.options import check_options, flag_of, option, parse_several

# The options of `eval` that are not those of `prune`.
EVALUATION = ("text", "windows", "tasks", "include_path", "num_fewshot", "limit")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is varied in a comparison, beside the options of methods; and what is kept of it.

    A field takes one value or several. Sparsities and patterns stand side by side: each is a goal
    of its own.
    """

    methods: Sequence[str] = option(
        ("magnitude", "wanda", "sparsegpt", "gblm"), "how weights are ranked", several=True
    )
    sparsity: Sequence[Any] = option(
        (), "fractions of zeros, between 0 and 1 [0.5]", parse=as_sparsity, several=True
    )
    pattern: Sequence[str] = option(
        (), "N:M keeps N of every M along the inputs, as 2:4", parse=as_pattern, several=True
    )
    seeds: Sequence[int] = option(
        (0,), "of draws of calibration samples; several give means and standard deviations",
        parse=int, several=True,
    )  # fmt: skip
    keep: str = option(
        "all", "which pruned models to keep; best: one of every sparsity and pattern",
        choices=("none", "best", "all"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        pattern = self.pattern
        if isinstance(pattern, tuple) and any(isinstance(part, int) for part in pattern):
            object.__setattr__(self, "pattern", [pattern])
        if any(
            isinstance(one, Mapping)
            for one in (*parse_several(self.sparsity), *parse_several(self.pattern))
        ):
            raise RequestError(
                "a comparison has one sparsity or pattern for all tensors of a row: prune by glob "
                "with prune, then measure with eval"
            )
        check_options(self)
        for name in ("methods", "seeds"):
            if not getattr(self, name):
                raise RequestError(f"{flag_of(name)} is empty: give at least one value")
        for name in self.methods:
            if self.methods.count(name) > 1:
                raise RequestError(f"--methods names the method {name} twice")

    @property
    def goals(self) -> list[dict[str, Any]]:
        """Return the sparsities and patterns to prune to, as fields of a `PruneRequest`."""
        goals = [{"sparsity": one, "pattern": None} for one in self.sparsity]
        goals += [{"sparsity": None, "pattern": one} for one in self.pattern]
        return goals or [{"sparsity": None, "pattern": None}]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the table: one method with its options, at one sparsity or pattern.

    Attributes:
        runs: A request for every seed; only one where nothing is measured.
    """

    runs: Sequence[PruneRequest]

    @property
    def method(self) -> str:
        """Return the name of the method."""
        return self.runs[0].method

    @property
    def goal(self) -> str:
        """Return "0.6", or "2:4"."""
        return goal_of(self.runs[0])

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the method, defaults included."""
        return asdict(self.runs[0].options)


def cells(
    shared: PruneRequest, grid: Grid, method_options: Mapping[str, Any], folder: Path
) -> list[Cell]:
    """Return all cells: goal by goal, and of each all methods; outputs are in `folder`.

    The name of an output is the method, and what has several values in the grid. Options are for
    those methods that have them.
    """
    if shared.statistics is not None or shared.save_statistics is not None:
        raise RequestError(
            "a comparison saves statistics for its own runs: leave out --statistics and "
            "--save-statistics"
        )
    owners = option_owners(grid.methods)
    for name in method_options:
        if name not in owners:
            raise no_option(name, grid.methods)
    varied = {name: parse_several(values) for name, values in method_options.items()}
    for name, values in varied.items():
        if not values:
            raise RequestError(f"{flag_of(name)} is empty: give at least one value")
    found = [
        _cell(replace(shared, method=method, method_options=options, **goal), grid, varied, folder)
        for goal in grid.goals
        for method in grid.methods
        for options in _combinations(
            {name: values for name, values in varied.items() if method in owners[name]}
        )
    ]
    _check_names([run.output.name for cell in found for run in cell.runs if run.output])
    return found


def goal_of(request: PruneRequest) -> str:
    """Return the sparsity of a request as it is typed, or its pattern."""
    pattern = request.rules[0].pattern
    return str(pattern) if isinstance(pattern, NofM) else f"{pattern.sparsity.normalize():f}"


def _combinations(varied: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*varied.values()):
        yield dict(zip(varied, values, strict=True))


def _cell(
    request: PruneRequest, grid: Grid, varied: Mapping[str, Sequence[Any]], folder: Path
) -> Cell:
    """Return the cell of a request that has all but seed and output."""
    parts = [request.method]
    if len(grid.goals) > 1:
        parts.append(goal_of(request).replace(":", "x"))
    parts += [
        f"{name.replace('_', '-')}{value:g}" if isinstance(value, (int, float)) else str(value)
        for name, value in request.method_options.items()
        if len(varied[name]) > 1
    ]
    measures = find_method(request.method).needs_with(request.options)
    seeds = grid.seeds if measures else grid.seeds[:1]
    names = ["-".join(parts)]
    if len(seeds) > 1:
        names = [f"{names[0]}-seed{seed}" for seed in seeds]
    runs = [
        replace(request, seed=seed, output=folder / name)
        for seed, name in zip(seeds, names, strict=True)
    ]
    return Cell(runs=runs)


def _check_names(names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RequestError(f"the comparison has {twice[0]} twice: give every value once")
