"""The header of a safetensors file, checked against the file before a byte of data is believed.

Format (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON header,
the data. Any deviation raises CheckpointError, which names tensor and file, expected and found.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.errors import CheckpointError, shown, shown_value
from lowmem_gblm.storage.checkpoint.file_access import ordinary_file
from lowmem_gblm.storage.checkpoint.strict_json import MAX_JSON_BYTES, strict_json

MAX_NUMEL = 2**62
MAX_DIMENSIONS = 16
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

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
    """The place of one tensor: `nbytes` bytes from `offset` of `file`, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def new_entry(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorEntry:
    """Return the description of a tensor that is to be written to `path`; its offset is unset."""
    nbytes = math.prod(shape) * dtype.itemsize
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=path, offset=0, nbytes=nbytes)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file of a model folder, by name."""
    return parse_header(path, read_header_text(path), ordinary_file(path.parent, path))


def read_header_text(path: Path) -> bytes:
    """Return the JSON text of the header of a safetensors file of a model folder."""
    size = ordinary_file(path.parent, path)
    with open(path, "rb") as file:
        return file.read(header_length(path, file.read(_LENGTH_BYTES), size))


def header_length(path: Path, beginning: bytes, size: int) -> int:
    """Return the length of the header in bytes, from the first eight of a file of `size` bytes."""
    length = int.from_bytes(beginning, "little")
    if not 2 <= length <= size - _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is no complete safetensors file: {size} bytes, of which the header declares "
            f"{length}"
        )
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has a header of {length} bytes, more than the {MAX_JSON_BYTES} that are read"
        )
    return length


def parse_header(path: Path, text: bytes, size: int) -> dict[str, TensorEntry]:
    """Return the tensors that a header describes, each within the file and apart from the others.

    `path` is for the entries and for messages; `size` is in bytes, of the complete file.
    """
    try:
        header = strict_json(text)
    except ValueError as error:
        raise CheckpointError(f"the header of {path} is not valid: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object")
    _check_metadata(path, header.pop(_METADATA, {}))
    data_start = _LENGTH_BYTES + len(text)
    entries = {
        name: _entry(path, name, description, data_start, size)
        for name, description in header.items()
    }
    _check_layout(path, entries, data_start, size)
    return entries


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or any(type(one) is not str for one in metadata.values()):
        raise CheckpointError(
            f"the header of {path} has a {_METADATA} that does not map names to texts"
        )


def _entry(path: Path, name: str, description: Any, data_start: int, size: int) -> TensorEntry:
    where = f"tensor {shown(name)} in {path}"
    if not isinstance(description, dict):
        raise CheckpointError(f"{where} has no description")
    dtype = _dtype(where, description.get("dtype"))
    shape = _integers(description.get("shape"))
    offsets = _integers(description.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has no valid shape and data_offsets")
    if math.prod(max(1, length) for length in shape) > MAX_NUMEL:
        raise CheckpointError(f"{where} has a shape of more than 2**62 numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    start, stop = offsets
    if stop - start != nbytes:
        raise CheckpointError(
            f"{where}: shape {list(shape)} in {DTYPE_NAMES[dtype]} takes {nbytes} bytes, its "
            f"data_offsets span {stop - start}"
        )
    if data_start + stop > size:
        raise CheckpointError(
            f"{where} ends at byte {data_start + stop}, the file at {size}: it is truncated"
        )
    return TensorEntry(
        name=name, dtype=dtype, shape=shape, file=path, offset=data_start + start, nbytes=nbytes
    )


def _dtype(where: str, name: Any) -> torch.dtype:
    found = DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"{where} has the unknown dtype {shown_value(name)}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    return found


def _integers(value: Any) -> tuple[int, ...] | None:
    """Return a tuple of non-negative integers, or None; bool, a subclass of int, is refused."""
    if not isinstance(value, list):
        return None
    if any(type(item) is not int or not 0 <= item <= MAX_NUMEL for item in value):
        return None
    return tuple(value)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Raise `CheckpointError` unless data follows the header without gap, overlap or tail."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise CheckpointError(
                f"tensor {shown(entry.name)} in {path} begins at byte {entry.offset}, "
                f"expected {position}"
            )
        position += entry.nbytes
    if position != size:
        raise CheckpointError(f"{path} has {size} bytes, its header accounts for {position}")
