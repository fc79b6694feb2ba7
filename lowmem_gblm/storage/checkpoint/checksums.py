"""Hashes of complete files: shards against the record, side files against those of the source.

A file that is not an ordinary file of its folder raises CheckpointError.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import shown, shown_value
from lowmem_gblm.storage.checkpoint.file_access import ordinary_file, side_files
from lowmem_gblm.storage.raw_io import file_pieces, summary

_SHA256 = re.compile("[0-9a-f]{64}")
_EDITABLE = ".md"


def check_hashes(shards: Any) -> None:
    """Raise `ValueError` unless these are names of files in one folder, each with size and hash."""
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"not shards with their hashes: {shown_value(shards)}")
    for name, described in shards.items():
        if Path(name).name != name or not is_summary(described):
            raise ValueError(f"not a shard with its hash: {shown_value({name: described})}")


def is_summary(value: Any) -> bool:
    """Return whether a value is a size and a hash, as `raw_io.summary` returns them."""
    return (
        isinstance(value, dict)
        and type(value.get("bytes")) is int
        and isinstance(value.get("sha256"), str)
        and _SHA256.fullmatch(value["sha256"]) is not None
    )


def hash_violations(folder: Path, shards: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for every shard that is gone or has other bytes; each file is read once."""
    for name, described in shards.items():
        path = folder / name
        if not path.exists():
            yield f"{name} is missing"
            continue
        size = ordinary_file(folder, path)
        if size != described["bytes"]:
            yield f"{name} has {size} bytes, the record says {described['bytes']}"
        elif (found := summary(file_pieces(path))["sha256"]) != described["sha256"]:
            yield f"{name} has the SHA-256 {found}, the record says {described['sha256']}"


def side_file_violations(folder: Path, source: Path) -> Iterator[str]:
    """Yield a sentence for every side file that an output lacks or has otherwise, but for `.md`."""
    for path in side_files(source):
        name = path.relative_to(source)
        copy = folder / name
        if not copy.exists():
            yield f"{shown(name)} of the source is missing"
            continue
        for home, file in ((source, path), (folder, copy)):
            ordinary_file(home, file)
        if name.suffix != _EDITABLE and summary(file_pieces(path)) != summary(file_pieces(copy)):
            yield f"{shown(name)} is not that of the source"
