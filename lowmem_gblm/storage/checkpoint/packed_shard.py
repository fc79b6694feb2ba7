"""A shard without its zeros: a safetensors file from which the bytes of the shard come back.

    header         the header of the shard, byte for byte: uint8 [bytes]
    mask/NAME      one bit for every number of the tensor NAME, lowest bit of a byte first: 1 if the
                   number is kept: uint8 [ceil(numbers / 8)]
    values/NAME    the kept numbers in their order, in the dtype of the tensor: [kept]
    dense/NAME     instead of both: a tensor that they would not make smaller, as it is

A number is left out if all of its bits are zero, so that negative zeros and the bits of a NaN come
back. Shards are read and written in pieces: memory does not grow with their tensors.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lowmem_gblm.errors import CheckpointError, shown
from lowmem_gblm.storage.checkpoint.header import (
    TensorEntry,
    header_length,
    new_entry,
    parse_header,
    read_header,
    read_header_text,
)
from lowmem_gblm.storage.checkpoint.reader import TENSOR_PIECE_BYTES, read_piece, tensor_pieces
from lowmem_gblm.storage.checkpoint.shard import publish_shard
from lowmem_gblm.storage.raw_io import Bytes, checked, summary

SUFFIX = ".packed.safetensors"
_HEADER, _MASK, _VALUES, _DENSE = "header", "mask/", "values/", "dense/"
_BIT_ORDER: Literal["little"] = "little"


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """What packing a shard has made of it.

    Attributes:
        original, packed: `bytes` and `sha256` of the shard, and of the packed file.
        tensors, masked: Tensors of the shard, and those stored as mask and values.
    """

    original: dict[str, Any]
    packed: dict[str, Any]
    tensors: int
    masked: int


def pack_shard(shard: Path, target: Path, check: Callable[[], None]) -> PackedShard:
    """Create the packed file of a shard; `check` is called before every piece, and may raise.

    Raises:
        CheckpointError: The shard cannot be read, or the packed file does not give its bytes back.
    """
    text = read_header_text(shard)
    tensors = _in_file_order(read_header(shard))
    kept = dict.fromkeys((tensor.name for tensor in tensors), 0)
    counted = (_counted(tensor, kept) for tensor in tensors)
    original = summary(checked(chain([_beginning(text)], *counted), check))
    parts = [_parts(tensor, target, kept[tensor.name]) for tensor in tensors]
    stored = [(new_entry(target, _HEADER, torch.uint8, (len(text),)), [text]), *chain(*parts)]
    # Numbers of many bytes come first, so that each begins at a multiple of its size.
    stored.sort(key=lambda part: part[0].dtype.itemsize, reverse=True)
    data = checked(chain.from_iterable(pieces for _, pieces in stored), check)
    packed = publish_shard(target, [entry for entry, _ in stored], data, "the packed shard")
    if summary(checked(unpacked_pieces(target, original["bytes"]), check)) != original:
        raise CheckpointError(
            f"{shard} has other bytes now than when packing it began: let no other program write "
            f"it, then give the same command again"
        )
    masked = sum(len(part) == 2 for part in parts)
    return PackedShard(original=original, packed=packed, tensors=len(tensors), masked=masked)


def unpacked_pieces(packed: Path, nbytes: int) -> Iterator[Bytes]:
    """Yield the bytes of the shard of `nbytes` bytes that a packed file was made from.

    Raises:
        CheckpointError: The file is damaged so that no shard can be read from it. Other damage
            gives other bytes.
    """
    parts = read_header(packed)
    header = _part(parts, _HEADER, packed)
    header_length(packed, _length(header.nbytes), nbytes)
    text = b"".join(map(bytes, tensor_pieces(header)))
    yield _beginning(text)
    for tensor in _in_file_order(parse_header(packed, text, nbytes)):
        if _DENSE + tensor.name in parts:
            yield from tensor_pieces(parts[_DENSE + tensor.name])
        else:
            mask = _part(parts, _MASK + tensor.name, packed)
            yield from _with_zeros(tensor, mask, _part(parts, _VALUES + tensor.name, packed))


def _part(parts: Mapping[str, TensorEntry], name: str, packed: Path) -> TensorEntry:
    if name not in parts:
        raise CheckpointError(f"{packed} is damaged: it lacks the part {shown(name)}")
    return parts[name]


def _parts(
    tensor: TensorEntry, target: Path, kept: int
) -> list[tuple[TensorEntry, Iterable[Bytes]]]:
    """Return what is stored of a tensor: mask and values, or if that is less, the tensor itself."""
    mask = new_entry(target, _MASK + tensor.name, torch.uint8, (-(-_numel(tensor) // 8),))
    values = new_entry(target, _VALUES + tensor.name, tensor.dtype, (kept,))
    if mask.nbytes + values.nbytes < tensor.nbytes:
        return [(mask, _mask_pieces(tensor)), (values, _value_pieces(tensor))]
    dense = new_entry(target, _DENSE + tensor.name, tensor.dtype, tensor.shape)
    return [(dense, tensor_pieces(tensor))]


def _counted(tensor: TensorEntry, kept: dict[str, int]) -> Iterator[Bytes]:
    """Yield the bytes of a tensor; count the numbers to keep in `kept`."""
    for piece in tensor_pieces(tensor):
        kept[tensor.name] += int(np.count_nonzero(_bits(piece, tensor)))
        yield piece


def _mask_pieces(tensor: TensorEntry) -> Iterator[Bytes]:
    for piece in tensor_pieces(tensor):
        yield np.packbits(_bits(piece, tensor) != 0, bitorder=_BIT_ORDER).tobytes()


def _value_pieces(tensor: TensorEntry) -> Iterator[Bytes]:
    for piece in tensor_pieces(tensor):
        bits = _bits(piece, tensor)
        yield bits[bits != 0].tobytes()


def _with_zeros(tensor: TensorEntry, mask: TensorEntry, values: TensorEntry) -> Iterator[Bytes]:
    """Yield the bytes of a tensor from its mask and its values."""
    numel, position = _numel(tensor), 0
    most = TENSOR_PIECE_BYTES // tensor.dtype.itemsize
    for start in range(0, numel, most):
        count = min(most, numel - start)
        packed_bits = np.frombuffer(read_piece(mask, start // 8, -(-count // 8)), np.uint8)
        kept = np.unpackbits(packed_bits, count=count, bitorder=_BIT_ORDER).view(np.bool_)
        nbytes = int(np.count_nonzero(kept)) * tensor.dtype.itemsize
        bits = np.zeros(count, f"u{tensor.dtype.itemsize}")
        bits[kept] = _bits(read_piece(values, position, nbytes), tensor)
        position += nbytes
        yield bits.tobytes()


def _bits(piece: Bytes, tensor: TensorEntry) -> np.ndarray[Any, Any]:
    """Return the numbers of a piece of a tensor as unsigned integers of the same bits."""
    return np.frombuffer(piece, f"u{tensor.dtype.itemsize}")


def _numel(tensor: TensorEntry) -> int:
    return math.prod(tensor.shape)


def _in_file_order(tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    return sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))


def _beginning(text: bytes) -> bytes:
    """Return what a safetensors file with this header has before its data."""
    return _length(len(text)) + text


def _length(nbytes: int) -> bytes:
    return nbytes.to_bytes(8, "little")
