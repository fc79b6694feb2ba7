"""The table of a comparison: for a terminal, as CSV, as Markdown.

For readers, tasks are a second table, so that both fit on a line; for programs, all numbers of a
row are on one line of CSV, as they were computed.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowmem_gblm.cli.console import table_lines
from lowmem_gblm.planning.messages import gibibytes

Row = dict[str, Any]
Rows = Sequence[Row]
# A heading, and a cell for every row.
Column = tuple[str, list[str]]

_TEXT = ("method", "output")


def _aligned(rows: Rows) -> list[str]:
    """Return tables for a terminal."""
    lines: list[str] = []
    for columns in _tables(rows):
        left = [at for at, (heading, _) in enumerate(columns) if heading in _TEXT]
        lines += ["", *table_lines(_lines(columns), left)]
    return lines[1:]


def _markdown(rows: Rows) -> list[str]:
    """Return tables of Markdown."""
    lines: list[str] = []
    for columns in _tables(rows):
        head, *body = _lines(columns)
        rule = ["---" if heading in _TEXT else "---:" for heading in head]
        lines += ["", *(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))]
    return lines[1:]


def _csv(rows: Rows) -> list[str]:
    """Return lines of CSV: a row a line, empty where a row has no such number."""
    flat = [_flat(row) for row in rows]
    fullest = sorted(flat, key=len, reverse=True)
    names = list(dict.fromkeys(name for one in fullest for name in one))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().splitlines()


# By the value of `--format`.
TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "table": _aligned, "markdown": _markdown, "csv": _csv,
}  # fmt: skip


def _tables(rows: Rows) -> Iterator[list[Column]]:
    """Yield the table of runs, and that of tasks if there are any."""
    names = _name_columns(rows)
    runs = [
        ("perplexity", [_mean_and_spread(row) for row in rows]),
        ("sparsity", [f"{row['sparsity']:.2%}" for row in rows]),
        ("peak memory", [_or_empty(row["host_peak_bytes"], gibibytes) for row in rows]),
        ("seconds", [_or_empty(row["seconds"], "{:.1f}".format) for row in rows]),
        ("output", [row["output"] or "" for row in rows]),
    ]
    yield names + [one for one in runs if any(one[1])]
    tasks = [(task, [_task(row["tasks"][task]) for row in rows]) for task in rows[0]["tasks"]]
    if tasks:
        accuracy = [_or_empty(row["accuracy"], _percent) for row in rows]
        yield [*names, *tasks, ("mean", accuracy)]


def _name_columns(rows: Rows) -> list[Column]:
    """Return the columns that tell rows apart: the method, and what has several values."""
    columns = [("method", [row["method"] for row in rows])]
    options = dict.fromkeys(name for row in rows for name in row["options"])
    varied = [("goal", [row["goal"] or "" for row in rows])]
    varied += [(name, [_value(row["options"].get(name)) for row in rows]) for name in options]
    return columns + [one for one in varied if len({cell for cell in one[1] if cell}) > 1]


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _mean_and_spread(row: Row) -> str:
    mean, spread = row["perplexity"], row["perplexity_sd"]
    return _or_empty(mean, "{:.3f}".format) + _or_empty(spread, " ± {:.3f}".format)


def _task(found: dict[str, Any]) -> str:
    """Return "63.4 ± 1.5", in percent; of a metric other than accuracy, the number."""
    text = _percent if found["metric"].startswith("acc") else "{:.3f}".format
    return text(found["value"]) + _or_empty(found["stderr"], lambda error: f" ± {text(error)}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _or_empty(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None else text(value)


def _lines(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    headings, cells = zip(*columns, strict=True)
    return [headings, *zip(*cells, strict=True)]


def _flat(row: Row) -> dict[str, Any]:
    """Return all numbers of a row by the names of their columns."""
    flat = {name: value for name, value in row.items() if not isinstance(value, (dict, list))}
    for task, found in row["tasks"].items():
        flat |= {task: found["value"], f"{task}_stderr": found["stderr"]}
    return {"method": row["method"], "goal": row["goal"], **row["options"], **flat}
