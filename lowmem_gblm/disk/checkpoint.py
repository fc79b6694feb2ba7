"""Reading a safetensors checkpoint: headers first, then single tensors by `pread`.

The format is that of https://github.com/huggingface/safetensors: eight bytes of header length, a
JSON header, the data. A checkpoint comes from strangers, so every header is checked against the
file it is in before a byte of data is believed. Tensors are read into buffers of their own: a
mapped file would count as resident memory for as long as it stays mapped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from lowmem_gblm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_NUMEL = 2**62
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Checkpoint:
    """A folder of safetensors shards whose headers have been read and checked.

    Attributes:
        folder: The model folder.
        tensors: Every tensor by name, in the order of the files.
        bytes_read: Tensor data read so far.

    Raises:
        CheckpointError: The folder is missing, holds only pickles, or a header, index or size is
            not what the format demands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.tensors: dict[str, TensorEntry] = {}
        for shard, expected in _shards(folder).items():
            entries = read_header(folder / shard)
            if expected is not None:
                _check_index(shard, expected, entries)
            for name, entry in entries.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name} is in two files: {self.tensors[name].file.name} and {shard}"
                    )
                self.tensors[name] = entry

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {len(self.tensors)} tensors)"

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of data of the named tensors; of all, without names."""
        chosen = self.tensors if names is None else names
        return sum(self.tensors[name].nbytes for name in chosen)

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor as it lies on disk: its own dtype and shape, on the CPU.

        Args:
            name: Which one.
            into: uint8 CPU memory of just its size; without it, new memory is taken.

        Raises:
            CheckpointError: The file has become shorter since its header was read.
        """
        entry = self.tensors[name]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8) if into is None else into
        _read_fully(entry, buffer)
        self.bytes_read += entry.nbytes
        return buffer.view(entry.dtype).view(entry.shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes that can be read and written."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_fully(entry: TensorEntry, buffer: torch.Tensor) -> None:
    view = raw_bytes(buffer)
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        done = 0
        while done < entry.nbytes:
            count = os.preadv(descriptor, [view[done:]], entry.offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{entry.file} ends inside tensor {entry.name}: {done} of {entry.nbytes} bytes"
                )
            done += count
    finally:
        os.close(descriptor)


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Shard file names, each with the tensors the index promises in it (None: no index)."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    if (folder / INDEX).is_file():
        return dict(_read_index(folder / INDEX))
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which can run code when they "
            f"are loaded and are not read here. Convert it once where you trust it: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _read_index(path: Path) -> dict[str, set[str]]:
    """Tensor names by shard, from `model.safetensors.index.json`."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{path} places tensor {tensor} in {shard!r}, which is not a file of the folder"
            )
        if not os.path.isfile(path.parent / shard):
            raise CheckpointError(f"{path} names the shard {shard}, which is missing")
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _check_index(shard: str, expected: set[str], entries: dict[str, TensorEntry]) -> None:
    missing = sorted(expected - entries.keys())
    if missing:
        raise CheckpointError(
            f"the index promises {missing[0]} in {shard}, whose header does not have it "
            f"({len(missing)} such tensors)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: Missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, checked against its size.

    Raises:
        CheckpointError: Says what is wrong, where, what was expected and what was found.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is no whole safetensors file: {size} bytes, of which the header claims "
                f"{length}"
            )
        header = _parse_header(path, file.read(length))
    data_start = 8 + length
    entries = {
        name: _entry(path, name, description, data_start, size)
        for name, description in header.items()
        if name != "__metadata__"
    }
    _check_layout(path, entries, data_start, size)
    return entries


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is not valid: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object")
    return header


def _entry(path: Path, name: str, description: Any, data_start: int, size: int) -> TensorEntry:
    where = f"tensor {name} in {path}"
    if not isinstance(description, dict):
        raise CheckpointError(f"{where} has no description")
    dtype = DTYPES.get(str(description.get("dtype")))
    if dtype is None:
        raise CheckpointError(f"{where} has the unknown dtype {description.get('dtype')!r}")
    shape = _integers(description.get("shape"))
    offsets = _integers(description.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{where} has no valid shape and data_offsets")
    if math.prod(max(1, length) for length in shape) > MAX_NUMEL:
        raise CheckpointError(f"{where} has a shape of more than 2**62 numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    start, stop = offsets
    if stop - start != nbytes:
        raise CheckpointError(
            f"{where}: shape {list(shape)} in {description['dtype']} takes {nbytes} bytes, its "
            f"data_offsets span {stop - start}"
        )
    if data_start + stop > size:
        raise CheckpointError(
            f"{where} ends at byte {data_start + stop}, the file at {size}: it is truncated"
        )
    return TensorEntry(
        name=name, dtype=dtype, shape=shape, file=path, offset=data_start + start, nbytes=nbytes
    )


def _integers(value: Any) -> tuple[int, ...] | None:
    """A tuple of non-negative integers, or None. (bool is an int subclass and would pass.)"""
    if not isinstance(value, list):
        return None
    if any(type(item) is not int or item < 0 for item in value):
        return None
    return tuple(value)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Data must follow the header without gap, overlap or tail."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise CheckpointError(
                f"tensor {entry.name} in {path} begins at byte {entry.offset}, expected {position}"
            )
        position += entry.nbytes
    if position != size:
        raise CheckpointError(f"{path} has {size} bytes, its header accounts for {position}")
