"""The numbers of a report, as JSON; the page shows these and no others."""

from collections.abc import Sequence
from typing import Any

from lowmem_gblm.commands.report.headlines import headlines
from lowmem_gblm.commands.report.kinds import Place
from lowmem_gblm.commands.report.measure import Measured, by_kind
from lowmem_gblm.commands.report.structure import Lines, Overlap, Structure, total

# Of pruning.json: what is told of single tensors and files.
_LEFT_OUT = ("tensors", "shards")


def numbers(measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the headlines, and for every output its run and the structure of its masks."""
    return {"headlines": headlines(measured), "outputs": [_output(one) for one in measured]}


def _output(one: Measured) -> dict[str, Any]:
    return {
        "output": one.output.path,
        "label": one.output.label,
        "run": {key: one.output.record[key] for key in one.output.record if key not in _LEFT_OUT},
        "evaluations": one.output.evaluations,
        "notes": one.output.notes,
        "total": _structure(total(one.structures.values())),
        "kinds": {kind: _structure(found) for kind, found in by_kind(one.structures).items()},
        "matrices": [_matrix(place, found) for place, found in one.structures.items()],
        "overlap": _overlaps(one),
    }


def _matrix(place: Place, found: Structure) -> dict[str, Any]:
    return {**place._asdict(), **_structure(found)}


def _structure(found: Structure) -> dict[str, Any]:
    return {
        "weights": found.weights,
        "zeros": found.zeros,
        "sparsity": found.sparsity,
        "rows": _lines(found.rows),
        "columns": _lines(found.columns),
    }


def _lines(found: Lines) -> dict[str, Any]:
    return {
        "lines": found.lines,
        "dead": found.dead,
        "dead_by_chance": found.dead_by_chance,
        "variance": found.variance,
        "variance_by_chance": found.squares_by_chance / found.lines,
        "dispersion": found.dispersion,
        "histogram": found.histogram_B.tolist(),
        "histogram_by_chance": [round(one, 2) for one in found.histogram_by_chance_B.tolist()],
    }


def _overlaps(one: Measured) -> dict[str, Any] | None:
    """Return the overlap with the first output; None for that itself, or if nothing is shared."""
    if not one.overlaps:
        return None
    kinds = by_kind(one.overlaps)
    return {
        "total": _overlap(total(kinds.values())),
        "kinds": {kind: _overlap(found) for kind, found in kinds.items()},
    }


def _overlap(found: Overlap) -> dict[str, Any]:
    return {
        "weights": found.weights,
        "common": found.common,
        "either": found.either,
        "share": found.share,
        "share_by_chance": found.share_by_chance,
        "jaccard": found.jaccard,
        "jaccard_by_chance": found.jaccard_by_chance,
    }
