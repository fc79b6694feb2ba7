"""The record of a finished run, `pruning.json`, as other commands read it."""

from pathlib import Path
from typing import Any

from lowmem_gblm.commands.promised_groups import contradictions
from lowmem_gblm.errors import CheckpointError
from lowmem_gblm.storage.checkpoint import checksums
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.strict_json import read_json

_KEYS = ("tensors", "sparsity", "sparsity_measured", "pattern", "group", "updates_weights")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of pruning.json; raise `CheckpointError` unless `prune` writes such."""
    if not (folder / RECORD).exists():
        raise CheckpointError(
            f"{folder} has no {RECORD}: it was not made by lowmem-gblm prune, so nothing says what "
            f"was done to it"
        )
    record = read_json(folder / RECORD)
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise CheckpointError(f"{RECORD} lacks {', '.join(missing)}")
    try:
        for one in record["tensors"].values():
            valid = (
                type(one["zeros"]) is int
                and one["layout"] in ("in,out", "out,in")
                and all(type(length) is int and length > 0 for length in one["shape"])
            )
            if not valid:
                raise ValueError(f"not a description of a tensor: {one}")
        if not record["tensors"]:
            raise ValueError("no tensors")
        list(contradictions(record))
        if "shards" in record:
            checksums.check_hashes(record["shards"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{RECORD} is not valid: {error!r}") from None
    return record
