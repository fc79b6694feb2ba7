"""Safetensors files that are written: complete at once, or growing part by part.

Writing raises OSError if the disk is full or failing.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.atomic import flush_folder, name_file, publish_file, temporary_name
from lowmem_gblm.storage.checkpoint.header import DTYPE_NAMES, TensorEntry
from lowmem_gblm.storage.checkpoint.reader import Checkpoint, raw_bytes
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.raw_io import (
    Bytes,
    file_pieces,
    opened,
    pieces_between,
    summary,
    write_at,
)


class PendingShard:
    """A safetensors file that grows part by part, and has its name only when it is complete.

    Size, header and the place of every part are those of the complete file from the first part on,
    so parts may come in any order that is known before, and what is on the disk stays as it is. A
    part is on the disk when `write` returns. Space that no part fills yet takes none of the disk.

    Args:
        parts: The tensors of every part by its number, in the order of the file.
        order: The numbers in the order in which the parts are written.

    Attributes:
        nbytes: Size of the complete file.
        written: `bytes` and `sha256` of the header and the parts that are on the disk, in the order
            in which they were written; of a complete file, in the order of the file.
    """

    def __init__(
        self, path: Path, parts: Mapping[int, Sequence[TensorEntry]], order: Sequence[int]
    ) -> None:
        self.path = path
        self._header = _header(chain.from_iterable(parts.values()))
        sizes = [sum(entry.nbytes for entry in entries) for entries in parts.values()]
        ends = [*accumulate(sizes, initial=len(self._header))]
        self._places = dict(zip(parts, pairwise(ends), strict=True))
        self._left = list(order)
        self._in_order = self._left == list(parts)
        self._hash = sha256()
        self.nbytes = ends[-1]
        self.written: dict[str, Any] = {"bytes": 0}

    @property
    def file(self) -> Path:
        """Return where the bytes are until the file is complete, or its name if it has that."""
        return self.path if self.path.exists() else temporary_name(self.path)

    def take_over(self, written: dict[str, Any]) -> None:
        """Begin after what an earlier attempt has `written`, which is read once more.

        Raises `JobError` if it has changed. A complete file is left to `verify`.
        """
        if written["bytes"] == self.nbytes:
            self.written = written
            self._left.clear()
            return
        with opened(self.file) as descriptor:
            self._add(pieces_between(descriptor, 0, len(self._header)))
            while self._left and self.written["bytes"] < written["bytes"]:
                self._add(pieces_between(descriptor, *self._places[self._left.pop(0)]))
        if self.written != written:
            raise JobError(
                f"{self.file} does not hold what an interrupted run has written: look at the disk; "
                f"to start over, remove {self.path.parent} and the work folder"
            )

    def write(self, part: int, data: Iterable[Bytes]) -> None:
        """Write the next part; the file gets its name with the last one."""
        following = self._left.pop(0)
        assert part == following, f"part {part} came before {following}"
        with (
            opened(self.file, os.O_RDWR | os.O_CREAT) as descriptor,
            blamed(self.path, "the shard"),
        ):
            if not self.written["bytes"]:
                os.ftruncate(descriptor, self.nbytes)
                self._add(_write(descriptor, 0, [self._header]))
            self._add(_write(descriptor, self._places[part][0], data))
            os.fsync(descriptor)
            flush_folder(self.path.parent)
        if not self._left:
            self._complete()

    def _add(self, pieces: Iterable[Bytes]) -> None:
        """Add pieces to the summary of what is on the disk."""
        size = self.written["bytes"]
        for piece in pieces:
            self._hash.update(piece)
            size += len(piece)
        self.written = {"bytes": size, "sha256": self._hash.hexdigest()}

    def _complete(self) -> None:
        if not self._in_order:
            self.written = summary(file_pieces(self.file, "the shard"))
        if self.file != self.path:
            name_file(self.path)


def _write(descriptor: int, offset: int, data: Iterable[Bytes]) -> Iterator[Bytes]:
    """Write data from an offset on; yield every piece that is written."""
    for piece in data:
        write_at(descriptor, memoryview(piece), offset)
        offset += len(piece)
        yield piece


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
