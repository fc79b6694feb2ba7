"""Writing the pruned checkpoint: one shard per decoder block, index last, then one rename.

Everything is written to `OUTPUT.partial/`, which `from_pretrained` refuses because the index is
missing until the very end. Shard names are known up front, so blocks may come in any order. Writing
raises OSError if the disk is full or failing, perhaps for a block before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lowmem_gblm.errors import JobError
from lowmem_gblm.runtime.background import SerialWorker
from lowmem_gblm.storage.atomic import Writable, publish_file, publish_folder, publish_json
from lowmem_gblm.storage.checkpoint.file_access import RECORD, ordinary_file, side_files
from lowmem_gblm.storage.checkpoint.reader import (
    DTYPE_NAMES,
    INDEX,
    Checkpoint,
    TensorEntry,
    raw_bytes,
)
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.locking import OwnedFolder

_PIECE_BYTES = 1 << 20


class CheckpointWriter:
    """A checkpoint that is being written.

    Args:
        final: The folder that will appear.
        source: The checkpoint being pruned.
        blocks: Names on disk of the tensors of every decoder block.
        owner: The job, as `storage.job.check_partial` reads it from the mark.
        keep: Shards that an earlier attempt has finished; all other files it left are removed.

    Attributes:
        shards: Finished shards, each with its `bytes` and its `sha256`.

    Raises:
        JobError: `final` exists; or `final.partial` is in use, is not a leftover of this tool, or
            lacks a finished shard.
    """

    def __init__(
        self,
        final: Path,
        source: Checkpoint,
        blocks: list[list[str]],
        owner: str,
        keep: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.final = final
        check_absent(final)
        self.shards = dict(keep or {})
        self.partial = partial_folder(final)
        self.bytes_written = 0
        self._source = source
        self._blocks = blocks
        in_blocks = {name for names in blocks for name in names}
        self._rest = [name for name in source.tensors if name not in in_blocks]
        self._folder = OwnedFolder(self.partial, owner)
        self._clean()
        self._writer = SerialWorker("write-block")

    def withdraw(self) -> None:
        """Do nothing: a job that is given up has nothing to undo here."""

    def close(self, *, keep: bool) -> None:
        """Stop writing; an unpublished output is kept for another attempt, or removed."""
        self._writer.close()
        if self.partial.exists() and not keep:
            self._folder.remove()
        else:
            self._folder.close()

    def finished(self, blocks: Iterable[int]) -> dict[str, Any]:
        """Return the entries of `shards` for these written blocks, for the journal."""
        return {shard: self.shards[shard] for shard in map(self._shard, blocks)}

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> Future[None]:
        """Publish the shard of decoder block `index` in a thread; return the future of that.

        `tensors` are on the CPU, dtypes as in the source, and unmodified until the future is done.
        """
        write = partial(write_tensors, tensors=dict(tensors))
        shard, names = self._shard(index), self._blocks[index]
        return self._writer.begin(self._write_shard, shard, names, write)

    def settle(self) -> None:
        """Wait until the last block has been written."""
        self._writer.settle()

    def committed(self, blocks: Iterable[int]) -> None:
        """Do nothing: once the journal has these blocks, their shards are final."""

    def write_rest(self, check: Callable[[], None]) -> None:
        """Write the shard of all other tensors and the side files; `check` may raise to stop."""
        self.settle()
        copy = partial(self._copy_tensors, check=check)
        self._write_shard(self._shard(len(self._blocks)), self._rest, copy)
        copy_side_files(self._source.folder, self.partial, check)

    def publish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write `record` as pruning.json, then the index; rename the folder; return `record`."""
        publish_json(self.partial / RECORD, record, "the record")
        publish_json(self.partial / INDEX, self._index(), "the index")
        publish_folder(self.partial, self.final)
        self._folder.release(self.final)
        return record

    def _clean(self) -> None:
        self._folder.empty(but=self.shards)
        for shard, finished in self.shards.items():
            path = self.partial / shard
            if not path.is_file() or path.stat().st_size != finished["bytes"]:
                self._folder.close()
                raise JobError(
                    f"{path} was written by an interrupted run and is missing or damaged: look at "
                    f"the disk; to start over, remove {self.partial} and the work folder"
                )

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self._blocks) + 1:05d}.safetensors"

    def _index(self) -> dict[str, Any]:
        weight_map = {
            name: self._shard(index)
            for index, names in enumerate([*self._blocks, self._rest])
            for name in names
        }
        return {
            "metadata": {"total_size": self._source.nbytes()},
            "weight_map": dict(sorted(weight_map.items())),
        }

    def _copy_tensors(
        self, file: Hashing, entries: list[TensorEntry], *, check: Callable[[], None]
    ) -> None:
        for entry in entries:
            for piece in self._source.pieces(entry.name):
                check()
                file.write(piece)

    def _write_shard(self, shard: str, names: list[str], write_data: WriteData) -> None:
        entries = [self._source.tensors[name] for name in names]
        self.shards[shard] = publish_shard(self.partial / shard, entries, write_data, "the shard")
        self.bytes_written += self.shards[shard]["bytes"]


class Hashing:
    """An open file that hashes with SHA-256 all that is written into it."""

    def __init__(self, file: Writable, hashed: Any) -> None:
        self._file = file
        self._hashed = hashed

    def write(self, data: bytes | memoryview) -> None:
        """Append `data` to the file and to what is hashed."""
        self._hashed.update(data)
        self._file.write(data)


WriteData = Callable[[Hashing, list[TensorEntry]], None]


def publish_shard(
    path: Path, entries: list[TensorEntry], write_data: WriteData, holds: str
) -> dict[str, Any]:
    """Create a safetensors file; return its `bytes` and `sha256`.

    Args:
        entries: Its tensors; their place in the source does not matter.
        write_data: Writes the data of the tensors, in this order.
        holds: What the file holds, for the sentence about a disk that fails.
    """
    header = _header(entries)
    hashed = sha256()

    def write(file: Hashing) -> None:
        file.write(header)
        write_data(file, entries)

    publish_file(path, lambda file: write(Hashing(file, hashed)), holds)
    size = len(header) + sum(entry.nbytes for entry in entries)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def summary_of(source: Checkpoint, entries: list[TensorEntry]) -> dict[str, Any]:
    """Return `bytes` and `sha256` of a shard that holds these tensors as the source has them."""
    header = _header(entries)
    hashed = sha256(header)
    for entry in entries:
        for piece in source.pieces(entry.name):
            hashed.update(piece)
    size = len(header) + sum(entry.nbytes for entry in entries)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def partial_folder(final: Path) -> Path:
    """Return the folder that an output is written to until it is complete."""
    return final.with_name(f"{final.name}.partial")


def check_absent(final: Path) -> None:
    """Raise `JobError` if the output exists: nothing is ever overwritten."""
    if os.path.lexists(final):
        raise JobError(f"{final} exists already: choose another OUTPUT, or move it away")


def copy_side_files(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy all files but weights; see `side_files`. `check` is called before every piece."""
    for path in side_files(source):
        relative = path.relative_to(source)
        ordinary_file(source, path)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        publish_file(target / relative, partial(_copy, path, check=check))


def _copy(source: Path, target: Writable, *, check: Callable[[], None]) -> None:
    with open(source, "rb") as file:
        while piece := _read(file, source):
            check()
            target.write(piece)


def _read(file: BinaryIO, path: Path) -> bytes:
    with blamed(path):
        return file.read(_PIECE_BYTES)


def _header(entries: Iterable[TensorEntry]) -> bytes:
    """Return the safetensors header, padded to 8 bytes; one metadata key keeps it deterministic."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    file: Hashing, entries: list[TensorEntry], *, tensors: dict[str, torch.Tensor]
) -> None:
    """Write the data of these entries from CPU tensors of the same names."""
    for entry in entries:
        tensor = tensors[entry.name]
        assert (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape), entry.name
        if entry.nbytes:
            file.write(raw_bytes(tensor.contiguous()))
