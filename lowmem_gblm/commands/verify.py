"""Proof that an output keeps its promises, from its files alone and against its source."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.commands.promised_groups import contradictions, cut, promised_groups
from lowmem_gblm.commands.pruned_record import read_record
from lowmem_gblm.errors import CheckpointError, VerificationError
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.storage.checkpoint import checksums
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.reader import INDEX, SINGLE, Checkpoint
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.hub import locate

NAMED = 10
_CONFIG = "config.json"

_UNHASHED = f"{RECORD} is older than hashes: a change that leaves every count as it is goes unseen"


def verify(
    output: str, against: str | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Check an output checkpoint; raise a `VerificationError` that names the first violations.

    Always: every shard has the SHA-256 of `pruning.json`, the index fits, the zeros are those that
    `pruning.json` counts and promises in every comparison group, and its counts are those of its
    pattern. Against the source (folder, Hub id, or "demo"): unpruned tensors byte-identical, kept
    weights bit-identical (unless the method updates them), no negative zero, no group with more
    zeros than asked beyond those that the source had, every side file as it was.
    """
    folder = locate(output)
    record = read_record(folder)
    hashes = record.get("shards", {})
    checkpoint = _readable(folder, hashes)
    source = Checkpoint(locate(against)) if against is not None else None
    progress = Progress(
        [
            Stage(name="hashes", steps=len(hashes), cost=1),
            Stage(name="tensors", steps=len(checkpoint.tensors), cost=1 if source is None else 2),
        ],
        listener,
    )
    changed: list[str] = []
    with progress.stage("hashes"):
        for name, described in hashes.items():
            changed += checksums.hash_violations(folder, {name: described})
            progress.step()
    violations = list(_folder_violations(folder, checkpoint, source, record))
    if not violations:
        with progress.stage("tensors"):
            for name in checkpoint.tensors:
                tensor = checkpoint.read(name)
                original = source.read(name) if source is not None else None
                violations += _tensor_violations(name, tensor, original, record)
                progress.step()
    if changed or violations:
        raise _broken(folder, [*changed, *violations])
    return {
        "output": output,
        "against": against,
        "tensors": len(checkpoint.tensors),
        "pruned_tensors": len(record["tensors"]),
        "hashed_shards": len(hashes),
        # The zeros of every tensor have just been found to be those of the record.
        "sparsity_measured": _sparsity(record),
        "notes": [] if hashes else [_UNHASHED],
    }


def _folder_violations(
    folder: Path, checkpoint: Checkpoint, source: Checkpoint | None, record: dict[str, Any]
) -> Iterator[str]:
    """Yield broken promises that show without a look at a single number."""
    if hashes := record.get("shards"):
        used = {entry.file.name for entry in checkpoint.tensors.values()}
        yield from (f"{name} has no hash in {RECORD}" for name in sorted(used - hashes.keys()))
    yield from _index_violations(folder, checkpoint, record)
    if not (folder / _CONFIG).is_file():
        yield f"{_CONFIG} is missing"
    yield from _record_violations(record, checkpoint)
    if source is not None:
        yield from _source_violations(checkpoint, source)
        yield from checksums.side_file_violations(folder, source.folder)


def _readable(folder: Path, hashes: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint; if changed shards make it unreadable, raise that as a violation."""
    try:
        return Checkpoint(folder)
    except CheckpointError as error:
        changed = list(checksums.hash_violations(folder, hashes))
        if not changed:
            raise
        raise _broken(folder, [*changed, str(error)]) from None


def _broken(folder: Path, violations: list[str]) -> VerificationError:
    more = f"\n… and {len(violations) - NAMED} more" if len(violations) > NAMED else ""
    return VerificationError(
        f"{folder} does not keep its promises:\n" + "\n".join(violations[:NAMED]) + more
    )


def _tensor_violations(
    name: str, tensor: Tensor, original: Tensor | None, record: dict[str, Any]
) -> Iterator[str]:
    """Yield broken promises of `pruning.json` about one tensor."""
    described = record["tensors"].get(name)
    if described is None:
        if original is not None and not torch.equal(_bits(tensor), _bits(original)):
            yield f"{name} was not to be pruned, and differs from the source"
        return
    zeros = int((tensor == 0).sum())
    if zeros != described["zeros"]:
        yield f"{name} has {zeros} zeros, {RECORD} says {described['zeros']}"
    kept = original is not None and not record["updates_weights"]
    yield from _group_violations(name, tensor, original if kept else None, described)
    if original is None:
        return
    if bool((tensor.signbit() & (tensor == 0) & (original != 0)).any()):
        yield f"{name} has a negative zero"
    if kept:
        changed = int(((_bits(tensor) != _bits(original)) & (tensor != 0)).sum())
        if changed:
            yield f"{name} has {changed} kept weights that differ from the source"


def _group_violations(
    name: str, tensor: Tensor, original: Tensor | None, described: dict[str, Any]
) -> Iterator[str]:
    """Yield groups with fewer zeros than recorded, or more beyond those of the original."""

    def wrong(label: str, amount: str, zeros: Tensor, where: Tensor, removed: int) -> Iterator[str]:
        places = where.nonzero().flatten().tolist()
        if places:
            yield (
                f"{name}: {len(places)} {label} with too {amount} zeros; the first, {places[0]}, "
                f"has {int(zeros[places[0]])} instead of {removed}"
            )

    found = _zeros_of_groups(tensor, described)
    for label, zeros, removed in found:
        yield from wrong(label, "few", zeros, zeros < removed, removed)
    if original is None:
        return
    before = _zeros_of_groups(original, described)
    for (label, zeros, removed), (_, own, _) in zip(found, before, strict=True):
        yield from wrong(label, "many", zeros, zeros > removed + own, removed)


def _zeros_of_groups(tensor: Tensor, described: dict[str, Any]) -> list[tuple[str, Tensor, int]]:
    """Return what groups are called, the zeros in each of them, and those promised in each."""
    weight = tensor.mT if described["layout"] == "in,out" else tensor
    groups = cut(weight, promised_groups(described))
    return [(label, (group == 0).sum(dim=1), removed) for label, group, removed in groups]


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.dtype.itemsize])


def _index_violations(
    folder: Path, checkpoint: Checkpoint, record: dict[str, Any]
) -> Iterator[str]:
    """Yield tensors and shards that the index lacks; the index must name exactly the shards.

    A model pruned in place may be one file without an index, and may have other files of weights,
    which it is not loaded from and which the run has not touched.
    """
    shards = dict.fromkeys(checkpoint.tensors, SINGLE)
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX)["weight_map"]
    surplus = sorted(checkpoint.tensors.keys() - shards.keys())
    if surplus:
        yield f"{surplus[0]} is in a shard, but not in {INDEX}"
    strays = {path.name for path in folder.glob("*.safetensors")} - set(shards.values())
    if record.get("in_place") is True:
        strays &= record.get("shards", {}).keys()
    yield from (f"{stray} is not named in {INDEX}" for stray in sorted(strays))


def _record_violations(record: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    yield from contradictions(record)
    for name, described in record["tensors"].items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            yield f"{name} is in {RECORD}, but not in the checkpoint"
        elif list(entry.shape) != described["shape"]:
            yield f"{name} has the shape {list(entry.shape)}, {RECORD} says {described['shape']}"
    recorded, counted = record["sparsity_measured"], _sparsity(record)
    if not math.isclose(counted, recorded):
        yield f"sparsity_measured is {recorded}, the tensors give {counted}"


def _sparsity(record: dict[str, Any]) -> float:
    """Return the fraction of zeros in all pruned tensors, by their counts in the record."""
    tensors = record["tensors"].values()
    numel = sum(math.prod(one["shape"]) for one in tensors)
    return float(sum(one["zeros"] for one in tensors) / numel)


def _source_violations(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[str]:
    for name, entry in source.tensors.items():
        found = checkpoint.tensors.get(name)
        if found is None:
            yield f"{name} of the source is missing"
        elif (found.dtype, found.shape) != (entry.dtype, entry.shape):
            yield (
                f"{name} is {found.dtype} {list(found.shape)}, in the source {entry.dtype} "
                f"{list(entry.shape)}"
            )
    for name in sorted(checkpoint.tensors.keys() - source.tensors.keys()):
        yield f"{name} is not in the source"
