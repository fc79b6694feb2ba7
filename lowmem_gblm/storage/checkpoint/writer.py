"""Writing the pruned checkpoint: one shard per decoder block, index last, then one rename.

Everything is written to `OUTPUT.partial/`, which `from_pretrained` refuses because the index is
missing until the very end. Shard names are known up front, so blocks may come in any order. Writing
raises OSError if the disk is full or failing, perhaps for a block before.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.runtime.background import SerialWorker
from lowmem_gblm.storage.atomic import publish_file, publish_json
from lowmem_gblm.storage.checkpoint.file_access import RECORD, ordinary_file, side_files
from lowmem_gblm.storage.checkpoint.header import DTYPE_NAMES, TensorEntry
from lowmem_gblm.storage.checkpoint.reader import INDEX, Checkpoint, raw_bytes
from lowmem_gblm.storage.pending_folder import PendingFolder
from lowmem_gblm.storage.raw_io import Bytes, checked, file_pieces, summary


class CheckpointWriter:
    """A checkpoint that is being written, and appears as the folder `final` when it is complete.

    Args:
        blocks: Names on disk of the tensors of every decoder block.
        owner: The job, as `storage.job.check_partial` reads it from the mark.
        keep: Shards that an earlier attempt has finished; all other files it left are removed.

    Attributes:
        shards: Finished shards, each with its `bytes` and its `sha256`.
    """

    def __init__(
        self,
        final: Path,
        source: Checkpoint,
        blocks: list[list[str]],
        owner: str,
        keep: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.shards = dict(keep or {})
        self.bytes_written = 0
        self._source = source
        self._blocks = blocks
        in_blocks = {name for names in blocks for name in names}
        self._rest = [name for name in source.tensors if name not in in_blocks]
        self._folder = PendingFolder(final, owner, self.shards)
        self._writer = SerialWorker("write-block")

    def close(self, *, keep: bool) -> None:
        """Stop writing; an unpublished output is kept for another attempt, or removed."""
        self._writer.close()
        self._folder.close(keep=keep)

    def finished(self, blocks: Iterable[int]) -> dict[str, Any]:
        """Return the entries of `shards` for these written blocks, for the journal."""
        return {shard: self.shards[shard] for shard in map(self._shard, blocks)}

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> Future[None]:
        """Publish the shard of decoder block `index` in a thread; return the future of that.

        `tensors` are on the CPU, dtypes as in the source, and unmodified until the future is done.
        """
        return self._writer.begin(self._write_block, index, dict(tensors))

    def settle(self) -> None:
        """Wait until the last block has been written."""
        self._writer.settle()

    def committed(self, blocks: Iterable[int]) -> None:
        """Do nothing: once the journal has these blocks, their shards are final."""

    def write_rest(self, check: Callable[[], None]) -> None:
        """Write the shard of all other tensors and the side files; `check` may raise to stop."""
        self.settle()
        entries = [self._source.tensors[name] for name in self._rest]
        pieces = chain.from_iterable(map(self._source.pieces, self._rest))
        self._write_shard(len(self._blocks), entries, checked(pieces, check))
        for path in side_files(self._source.folder):
            ordinary_file(self._source.folder, path)
            copy = self._folder.path / path.relative_to(self._source.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            publish_file(copy, checked(file_pieces(path), check))

    def publish(self, record: dict[str, Any]) -> None:
        """Write `record` as pruning.json, then the index; rename the folder."""
        publish_json(self._folder.path / RECORD, record, "the record")
        publish_json(self._folder.path / INDEX, self._index(), "the index")
        self._folder.publish()

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

    def _write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        entries = [self._source.tensors[name] for name in self._blocks[index]]
        data = tensor_data(entries, (tensors[entry.name] for entry in entries))
        self._write_shard(index, entries, data)

    def _write_shard(self, index: int, entries: list[TensorEntry], data: Iterable[Bytes]) -> None:
        path = self._folder.path / self._shard(index)
        self.shards[path.name] = publish_shard(path, entries, data, "the shard")
        self.bytes_written += self.shards[path.name]["bytes"]


def publish_shard(
    path: Path, entries: Sequence[TensorEntry], data: Iterable[Bytes], holds: str
) -> dict[str, Any]:
    """Create a safetensors file of tensors, with their data in this order; return its summary."""
    return publish_file(path, chain([_header(entries)], data), holds)


def shard_summary(source: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    """Return the summary of a shard that holds these tensors as the source has them."""
    header = _header([source.tensors[name] for name in names])
    return summary(chain([header], *map(source.pieces, names)))


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


def tensor_data(entries: Iterable[TensorEntry], tensors: Iterable[torch.Tensor]) -> Iterator[Bytes]:
    """Yield the data of these entries from their tensors, which are asked for one by one."""
    for entry, tensor in zip(entries, tensors, strict=True):
        assert (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape), entry.name
        if entry.nbytes:
            yield raw_bytes(tensor.cpu().contiguous())
