"""The outputs that a report compares: of one architecture, each with a label of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.pruned_record import read_record
from lowmem_gblm.errors import CheckpointError, RequestError, shown
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.hub import locate

# What `eval OUTPUT --json` has printed, where the user has saved it in the output.
EVALUATIONS = "evaluation*.json"


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output of `prune`.

    Attributes:
        path: As the user named it.
        label: What the report calls it.
        record: The content of its pruning.json.
        evaluations: What was measured of it.
        notes: What was found beside it and not used.
    """

    path: str
    label: str
    record: dict[str, Any]
    checkpoint: Checkpoint
    evaluations: list[dict[str, Any]]
    notes: list[str]


def open_outputs(paths: Sequence[str]) -> list[Output]:
    """Return the outputs; raise a `LowmemGblmError` if one is none, or is of another model."""
    folders = [locate(path) for path in paths]
    records = [read_record(folder) for folder in folders]
    labels = _labels(paths, folders, records)
    found: list[Output] = []
    for path, folder, label, record in zip(paths, folders, labels, records, strict=True):
        if any(folder.samefile(one.checkpoint.folder) for one in found):
            raise RequestError(f"{path} is named twice: give other outputs to --against")
        evaluations, notes = evaluations_of(folder, record)
        output = Output(
            path=path,
            label=label,
            record=record,
            checkpoint=Checkpoint(folder),
            evaluations=evaluations,
            notes=notes,
        )
        _check_tensors(output)
        found.append(output)
        _check_same_model(found[0], output)
        notes += _other_source(found[0], output)
    return found


def _labels(
    paths: Sequence[str], folders: Sequence[Path], records: Sequence[dict[str, Any]]
) -> list[str]:
    """Return the methods, if each made one of the outputs; else names of folders, or paths."""
    methods = [shown(record.get("method", "unknown method")) for record in records]
    names = [shown(folder.name) for folder in folders]
    choices = (methods, names, [shown(path) for path in paths])
    return next((one for one in choices if len(set(one)) == len(one)), choices[-1])


def _check_same_model(first: Output, other: Output) -> None:
    """Raise `RequestError` unless two checkpoints have the same names and shapes."""
    shapes, others = (
        {name: entry.shape for name, entry in one.checkpoint.tensors.items()}
        for one in (first, other)
    )
    names = sorted(shapes.keys() | others.keys())
    different = [name for name in names if shapes.get(name) != others.get(name)]
    if different:
        name = different[0]
        raise RequestError(
            f"{other.path} is of another model than {first.path}: {shown(name)} is "
            f"{_shape(others.get(name))} instead of {_shape(shapes.get(name))} ({len(different)} "
            f"such tensors). Give outputs of one model"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _check_tensors(output: Output) -> None:
    """Raise `CheckpointError` if the record describes tensors that the output does not have."""
    for name, described in output.record["tensors"].items():
        entry = output.checkpoint.tensors.get(name)
        if entry is None or list(entry.shape) != described["shape"]:
            raise CheckpointError(
                f"{output.path} does not have the tensor {shown(name)} as its {RECORD} describes "
                f"it: lowmem-gblm verify says what else is different"
            )


def _other_source(first: Output, other: Output) -> list[str]:
    """Say that the dense weights were others; of runs in place no fingerprint tells that."""
    seen = [
        one.record["fingerprints"].get("source_bytes")
        for one in (first, other)
        if isinstance(one.record.get("fingerprints"), dict) and not one.record.get("in_place")
    ]
    if len(seen) < 2 or seen[0] == seen[1]:
        return []
    return [f"pruned from other weights than {first.path}, of the same names and shapes"]


def evaluations_of(folder: Path, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what was measured of the output that the record describes, and what was not used."""
    evaluations, notes = [], []
    for path in sorted(folder.glob(EVALUATIONS)):
        try:
            found = read_json(path)
        except CheckpointError as error:
            notes.append(f"not used: {error}")
            continue
        if found.get("job") is not None and found.get("job") == record.get("job"):
            evaluations.append(found)
        else:
            notes.append(f"not used: {path} does not name the job of this output")
    return evaluations, notes
