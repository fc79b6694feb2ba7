"""Writing the pruned checkpoint: one shard per decoder block, index last, then one rename.

Everything is written to `OUTPUT.partial/`, which `from_pretrained` refuses because the index is
missing until the very end. Shard names are known up front, so blocks may come in any order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lowmem_gblm.disk.checkpoint import DTYPE_NAMES, INDEX, Checkpoint, TensorEntry, raw_bytes
from lowmem_gblm.disk.folder import MARK, OwnFolder
from lowmem_gblm.disk.publish import publish_file, publish_folder, publish_json
from lowmem_gblm.errors import JobError

RECORD = "pruning.json"
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite",
}  # fmt: skip
_SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}


class Output:
    """The checkpoint being written.

    Args:
        final: The folder that will appear.
        source: The checkpoint being pruned.
        blocks: Names on disk of the tensors of every decoder block.

    Raises:
        JobError: `final` exists, or `final.partial` is in use or not a leftover of this tool.
    """

    def __init__(self, final: Path, source: Checkpoint, blocks: list[list[str]]) -> None:
        self.final = final
        check_absent(final)
        self.partial = final.with_name(final.name + ".partial")
        self.bytes_written = 0
        self._source = source
        self._blocks = blocks
        in_blocks = {name for names in blocks for name in names}
        self._rest = [name for name in source.tensors if name not in in_blocks]
        self._folder = OwnFolder(self.partial)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        """Without `publish`, what was written goes."""
        if self.partial.exists():
            self._folder.remove()

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Publish the shard of decoder block `index`; tensors are CPU, dtypes as in the source."""
        self._write_shard(self._shard(index), self._blocks[index], tensors.__getitem__)

    def write_rest(self) -> None:
        """Write the shard of everything that no block holds, and copy the side files."""
        self._write_shard(self._shard(len(self._blocks)), self._rest, self._source.read)
        copy_side_files(self._source.folder, self.partial)

    def publish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write `record` as pruning.json, then the index; then the folder gets its name.

        Returns:
            `record`.
        """
        publish_json(self.partial / RECORD, record)
        publish_json(self.partial / INDEX, self._index())
        publish_folder(self.partial, self.final)
        self._folder.release(self.final)
        return record

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

    def _write_shard(
        self, shard: str, names: list[str], tensor: Callable[[str], torch.Tensor]
    ) -> None:
        entries = [self._source.tensors[name] for name in names]
        header = _header(entries)

        def write(file: BinaryIO) -> None:
            file.write(header)
            for entry in entries:
                _write_tensor(file, entry, tensor(entry.name))

        publish_file(self.partial / shard, write)
        self.bytes_written += len(header) + sum(entry.nbytes for entry in entries)


def check_absent(final: Path) -> None:
    """Raise `JobError` if the output exists: nothing is ever overwritten."""
    if os.path.lexists(final):
        raise JobError(f"{final} exists already: choose another OUTPUT, or move it away")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything but weights: config, tokenizer, generation config, licence, README, …

    Symbolic links (as in a Hub cache) are followed; caches and version control are left out.
    """
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(
            name
            for name in set(folders) - _SKIPPED_FOLDERS
            if not Path(folder, name, MARK).exists()
        )
        for name in sorted(files):
            path = Path(folder, name)
            relative = path.relative_to(source)
            if _is_weight_file(name) or relative == Path(RECORD):
                continue
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            publish_file(target / relative, partial(_copy, path))


def _copy(source: Path, target: BinaryIO) -> None:
    with open(source, "rb") as file:
        shutil.copyfileobj(file, target)


def _is_weight_file(name: str) -> bool:
    if name.endswith(".index.json") or name == MARK:
        return True
    return Path(name).suffix in _WEIGHT_SUFFIXES


def _header(entries: Iterable[TensorEntry]) -> bytes:
    """The safetensors header, padded to eight bytes; one metadata key, so its order is stable."""
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


def _write_tensor(file: BinaryIO, entry: TensorEntry, tensor: torch.Tensor) -> None:
    assert (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape), entry.name
    if entry.nbytes:
        file.write(raw_bytes(tensor.contiguous()))
