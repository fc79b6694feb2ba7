"""The table of runs: what was asked, with what, what it gave and what it took, from the records."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from lowmem_gblm.planning.messages import gibibytes
from lowmem_gblm.storage.hub import public_name

Run = dict[str, Any]

# The hash of the samples of a run that needs none.
NO_TOKENS = hashlib.sha256().hexdigest()
_WITHIN = {"row": "each row", "matrix": "each matrix", "columns": "blocks of columns"}
# Of the harness: what a task reports that is no number of its own.
_ERROR = "_stderr"
_TOO_LARGE = 1e300


def facts(outputs: list[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """Return rows of a table: a heading, and for every output the lines of its cell.

    A row that no output has anything for is left out. Records may come from any version, or be
    written by others: what is missing or of another type is not told.
    """
    rows = [(heading, [list(told(one)) for one in outputs]) for heading, told in _ROWS.items()]
    return [(heading, cells) for heading, cells in rows if any(cells)]


def _method(output: Run) -> Iterator[str]:
    run = output["run"]
    yield str(run.get("method", "not recorded"))
    for name in ("alpha", "gradient_norm"):
        if run.get(name) is not None:
            chosen = number(run, "search", "chosen", name)
            told = "" if chosen is None else f", which has chosen {chosen:g}"
            yield f"{name.replace('_', ' ')} {run[name]}{told}"


def _pattern(output: Run) -> Iterator[str]:
    run = output["run"]
    sparsity, pattern = run["sparsity"], run["pattern"]
    if isinstance(sparsity, dict):
        yield from (f"{glob}: {_goal(run, sparsity[glob], pattern[glob])}" for glob in sparsity)
    else:
        yield _goal(run, sparsity, pattern)
    yield f"{output['total']['sparsity']:.2%} zeros measured"
    if run["updates_weights"]:
        yield "kept weights were updated"


def _goal(run: Run, sparsity: float, pattern: str) -> str:
    if pattern != "unstructured":
        return f"{pattern} along the inputs"
    return f"{sparsity:.1%} of {_WITHIN.get(str(run['group']), str(run['group']))}"


def _calibration(output: Run) -> Iterator[str]:
    run = output["run"]
    if _at(run, "fingerprints", "calibration_tokens") == NO_TOKENS:
        yield "none needed"
    elif "calibration" in run:
        size = f"{run.get('nsamples')} × {run.get('seqlen')} tokens"
        yield f"{size} of {run['calibration']}{_bos(run.get('bos'))}"
        yield f"seed {run.get('seed')}"
        if run.get("dropped_samples"):
            yield f"non-finite samples left out: {run['dropped_samples']}"


def _computed(output: Run) -> Iterator[str]:
    run = output["run"]
    if "dtype" in run:
        yield f"{run['dtype']} on {run.get('device')}"


def _perplexity(output: Run) -> Iterator[str]:
    for one in output["evaluations"]:
        if (value := number(one, "perplexity")) is not None:
            yield f"{value:.3f} on {windows(one)}"


def windows(evaluation: Run) -> str:
    """Return what a perplexity was measured on; those of other windows do not compare with it."""
    count, length, begin = (evaluation.get(name) for name in ("windows", "seqlen", "bos"))
    # Pages and cards are for others: they have no path of this machine.
    text = public_name(str(evaluation.get("text")))
    return f"{text} ({count} windows of {length} tokens{_bos(begin)})"


def _bos(begin: Any) -> str:
    return ", each begun with <bos>" if begin == "always" else ""


def _tasks(output: Run) -> Iterator[str]:
    for one in output["evaluations"]:
        results = one.get("results")
        for task, found in results.items() if isinstance(results, dict) else ():
            for metric in found if isinstance(found, dict) else ():
                name, _, chosen = metric.partition(",")
                value = number(found, metric)
                if value is None or name.endswith(_ERROR):
                    continue
                error = number(found, f"{name}{_ERROR},{chosen}")
                yield f"{task} {name} {value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _seconds(output: Run) -> Iterator[str]:
    seconds = output["run"].get("seconds")
    if isinstance(seconds, dict) and (complete := number(seconds, "total")) is not None:
        yield f"{complete:.1f} s"
        stages = {name: number(seconds, name) for name in seconds if name != "total"}
        yield ", ".join(
            f"{name} {value:.1f}" for name, value in stages.items() if value is not None
        )


def _memory(output: Run) -> Iterator[str]:
    used = output["run"].get("memory")
    for part, kind in (("host", "host"), ("gpu", "GPU")):
        size = number(used, f"{part}_peak_bytes")
        # A run without a GPU uses none of its memory.
        if size:
            yield f"{kind} {_of_plan(size, number(used, f'{part}_planned_bytes'))}"


def _bytes(output: Run) -> Iterator[str]:
    for what in ("read", "written"):
        if (size := number(output["run"], "bytes", what)) is not None:
            yield f"{what} {_of_plan(size, number(output['run'], 'bytes_planned', what))}"


def _of_plan(size: float, planned: float | None) -> str:
    """Return bytes as text, and what the plan said they would be."""
    text = gibibytes(round(size))
    return text if planned is None else f"{text}, planned {gibibytes(round(planned))}"


def _versions(output: Run) -> Iterator[str]:
    versions = output["run"].get("versions")
    if isinstance(versions, dict):
        yield from (f"{name} {version}" for name, version in versions.items())


def _notes(output: Run) -> Iterator[str]:
    yield from output["notes"]
    notes = output["run"].get("notes")
    yield from map(str, notes if isinstance(notes, list) else ())


def _at(value: Any, *keys: str) -> Any:
    """Return what is inside nested objects, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any, *keys: str) -> float | None:
    """Return a number inside nested objects; None if there is none that can be shown."""
    found = _at(value, *keys)
    valid = isinstance(found, int | float) and not isinstance(found, bool)
    return float(found) if valid and abs(found) < _TOO_LARGE else None


_ROWS: dict[str, Callable[[Run], Iterator[str]]] = {
    "Method": _method,
    "Pattern": _pattern,
    "Calibration": _calibration,
    "Computed in": _computed,
    "Perplexity": _perplexity,
    "Tasks": _tasks,
    "Time": _seconds,
    "Peak memory": _memory,
    "Checkpoint": _bytes,
    "Versions": _versions,
    "Notes": _notes,
}
