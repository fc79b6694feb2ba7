"""The rows of the table: what was measured of the runs of every cell, and what to know about it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_gblm.commands.compare.grid import Cell

Row = dict[str, Any]
Noted = Mapping[str, Any]
# What of a task is in the table: accuracy if it has one, else its first metric.
_ACCURACY = "acc,none"
_STDERR = "_stderr"


def table_rows(
    dense: Mapping[str, Any], cells: Sequence[tuple[Cell, Sequence[Noted]]]
) -> list[Row]:
    """Return a row for the dense model and for every cell.

    Args:
        dense: What was measured of the dense model.
        cells: Every cell, with what the ledger has of its runs, their `seed` and `output`.
    """
    model = {"seed": None, "output": None, "evaluation": dense, "record": {}}
    rows = [_row("dense", None, {}, [model])]
    rows += [_row(cell.method, cell.goal, cell.options, runs) for cell, runs in cells]
    for row in rows:
        row["notes"] = _other_sparsity(row, rows) + _shared(row) + _chosen(row)
    return rows


def quality(evaluation: Mapping[str, Any]) -> float:
    """Return a number that is smaller for a better model: perplexity, or accuracy below 0."""
    if "perplexity" in evaluation:
        return float(evaluation["perplexity"])
    accuracy = _mean_accuracy(_tasks(evaluation))
    return 0.0 if accuracy is None else -accuracy


def _row(method: str, goal: str | None, options: dict[str, Any], noted: Sequence[Noted]) -> Row:
    """Return a row: numbers are means over runs, peaks the highest; `output` if there is one."""
    runs = [_run(one) for one in noted]
    perplexities, outputs = _values(runs, "perplexity"), _values(runs, "output")
    tasks = _tasks_of_all(runs)
    return {
        "method": method,
        "goal": goal,
        "options": options,
        "perplexity": _mean(perplexities),
        "perplexity_sd": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
        "tasks": tasks,
        "accuracy": _mean_accuracy(tasks),
        "sparsity": _mean(_values(runs, "sparsity")),
        "seconds": _mean(_values(runs, "seconds")),
        "host_peak_bytes": max(_values(runs, "host_peak_bytes"), default=None),
        "gpu_peak_bytes": max(_values(runs, "gpu_peak_bytes"), default=None),
        "output": outputs[0] if len(outputs) == 1 else None,
        "runs": runs,
    }


def _run(noted: Noted) -> dict[str, Any]:
    record, evaluation = noted["record"], noted["evaluation"]
    used = record.get("memory", {})
    return {
        "seed": noted["seed"],
        "perplexity": evaluation.get("perplexity"),
        "tasks": _tasks(evaluation),
        "sparsity": record.get("sparsity_measured", 0.0),
        "seconds": record.get("seconds", {}).get("total"),
        "host_peak_bytes": used.get("host_peak_bytes"),
        "gpu_peak_bytes": used.get("gpu_peak_bytes"),
        "taken": record.get("statistics", {}).get("taken", []),
        "search": record.get("search"),
        "output": noted["output"],
    }


def _tasks(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metric of every task that the table shows, and its standard error."""
    found = {}
    for task, values in evaluation.get("results", {}).items():
        metrics = [
            name
            for name, value in values.items()
            if "," in name and not _is_error(name) and isinstance(value, (int, float))
        ]
        if metrics and task not in evaluation.get("groups", {}):
            metric = _ACCURACY if _ACCURACY in metrics else metrics[0]
            kind, _, filtered = metric.partition(",")
            error = values.get(f"{kind}{_STDERR},{filtered}")
            error = error if isinstance(error, (int, float)) else None
            found[task] = {"metric": metric, "value": values[metric], "stderr": error}
    return found


def _is_error(name: str) -> bool:
    return name.partition(",")[0].endswith(_STDERR)


def _tasks_of_all(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the means of every task over the runs of a cell; standard errors too."""
    return {
        task: {
            "metric": first["metric"],
            "value": _mean(_values([run["tasks"][task] for run in runs], "value")),
            "stderr": _mean(_values([run["tasks"][task] for run in runs], "stderr")),
        }
        for task, first in runs[0]["tasks"].items()
    }


def _mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean over the tasks that have an accuracy."""
    return _mean([one["value"] for one in tasks.values() if one["metric"] == _ACCURACY])


def _values(runs: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [run[name] for run in runs if run[name] is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _other_sparsity(row: Row, rows: Sequence[Row]) -> list[str]:
    """Say that rows of one goal differ in their zeros, as the table shows them."""
    alike = sorted(one["sparsity"] for one in rows if one["goal"] == row["goal"])
    least, most = f"{alike[0]:.2%}", f"{alike[-1]:.2%}"
    if least == most:
        return []
    return [
        f"rows at {row['goal']} have from {least} to {most} zeros, because every method rounds "
        f"within groups of its own: they do not compare exactly"
    ]


def _shared(row: Row) -> list[str]:
    taken = sorted({name for run in row["runs"] for name in run["taken"]})
    if not taken:
        return []
    one = len(taken) == 1
    return [
        f"the statistic{'s' * (not one)} {' and '.join(taken)} {'was' if one else 'were'} measured "
        f"by the first run that needs {'it' if one else 'them'}; the seconds of the other rows do "
        f"not have that"
    ]


def _chosen(row: Row) -> list[str]:
    """Say what runs have chosen for options that are "auto"."""
    return [
        f"{row['method']} at {row['goal']}, seed {run['seed']}, has chosen {name} {value}"
        for run in row["runs"]
        for name, value in ((run["search"] or {}).get("chosen") or {}).items()
    ]
