"""Reading a safetensors checkpoint: headers first, then single tensors by `pread`.

Tensors are read into buffers of their own: a mapped file would count as resident memory for as long
as it stays mapped. Reading raises CheckpointError if a file has become shorter than its header
said.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch

from lowmem_gblm.errors import CheckpointError, NonFiniteError, shown, shown_value
from lowmem_gblm.storage.checkpoint.file_access import ordinary_file, side_files
from lowmem_gblm.storage.checkpoint.header import TensorEntry, read_header
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.raw_io import opened, read_at

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# A multiple of 64: pieces of a tensor of any dtype hold a multiple of 8 numbers.
TENSOR_PIECE_BYTES = 1 << 24
_PIECE_NUMBERS = 1 << 15
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """A folder of safetensors shards, read and checked: headers, index, names of side files.

    What is not as the format demands, or may not be read, raises a `CheckpointError`.

    Attributes:
        tensors: Every tensor by name, in the order of the files.
        bytes_read: Tensor data read so far.
        on_disk: Whether the tensors can be read; False for a `described` checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.on_disk = True
        self.tensors: dict[str, TensorEntry] = {}
        self._finite: set[str] = set()
        for shard, expected in _shards(folder).items():
            entries = read_header(folder / shard)
            if expected is not None:
                _check_index(shard, expected, entries)
            for name, entry in entries.items():
                if name in self.tensors:
                    first = self.tensors[name].file.name
                    raise CheckpointError(
                        f"tensor {shown(name)} is in two files: {shown(first)} and {shown(shard)}"
                    )
                self.tensors[name] = entry
        for path in side_files(folder):
            ordinary_file(folder, path)

    @classmethod
    def described(cls, folder: Path, entries: Iterable[TensorEntry]) -> Self:
        """Return a checkpoint of described tensors: enough for a plan, never to be read."""
        made = cls.__new__(cls)
        made.folder, made.bytes_read, made.on_disk = folder, 0, False
        made.tensors = {entry.name: entry for entry in entries}
        return made

    def nbytes(self, names: Iterable[str] | None = None) -> int:
        """Return the bytes of data of the named tensors; of all tensors if `names` is None."""
        chosen = self.tensors if names is None else names
        return sum(self.tensors[name].nbytes for name in chosen)

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tensor as it is on disk: its own dtype and shape, on the CPU.

        `into` is uint8 CPU memory of just the tensor's bytes; if None, new memory is taken.
        """
        self.bytes_read += self.tensors[name].nbytes
        return read_tensor(self.tensors[name], into)

    def read_finite(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tensor as `read` does; raise `NonFiniteError` for a NaN or an infinity.

        A tensor that was read before is not looked through again.
        """
        tensor = self.read(name, into)
        if name in self._finite or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            return tensor
        # In pieces too small for torch to call in threads, which would disturb the computation.
        for piece in tensor.view(-1).split(_PIECE_NUMBERS):
            # Unlike `isfinite().all()` this takes no memory; a NaN is its own minimum and maximum.
            extremes = torch.stack(piece.aminmax())
            if not bool(extremes.isfinite().all()):
                raise NonFiniteError(
                    f"{shown(name)} holds NaN or infinite weights in {self.tensors[name].file}: "
                    f"{extremes.tolist()}"
                )
        self._finite.add(name)
        return tensor

    def first_bytes(self, name: str, count: int) -> bytes:
        """Return the first `count` bytes of a tensor, to tell it from others."""
        buffer = torch.empty(min(count, self.tensors[name].nbytes), dtype=torch.uint8)
        _read_fully(self.tensors[name], buffer)
        return raw_bytes(buffer).tobytes()

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces, each valid until the next one is asked for."""
        for piece in tensor_pieces(self.tensors[name]):
            self.bytes_read += len(piece)
            yield piece


def tensor_pieces(entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces, each valid until the next one is asked for."""
    buffer = torch.empty(min(entry.nbytes, TENSOR_PIECE_BYTES), dtype=torch.uint8)
    for start in range(0, entry.nbytes, TENSOR_PIECE_BYTES):
        part = buffer[: entry.nbytes - start]
        _read_fully(entry, part, start)
        yield raw_bytes(part)


def read_tensor(entry: TensorEntry, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return a tensor as it is on disk; `into` is memory for it, as for `Checkpoint.read`."""
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8) if into is None else into
    _read_fully(entry, buffer)
    return buffer.view(entry.dtype).view(entry.shape)


def read_piece(entry: TensorEntry, start: int, nbytes: int) -> memoryview:
    """Return `nbytes` bytes of a tensor from its byte `start` on."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    _read_fully(entry, buffer, start)
    return raw_bytes(buffer)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, as bytes that can be read and written."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_fully(entry: TensorEntry, buffer: torch.Tensor, start: int = 0) -> None:
    """Fill a buffer with the bytes of a tensor from `start` on."""
    with opened(entry.file) as descriptor, blamed(entry.file, "the shard"):
        done = read_at(descriptor, raw_bytes(buffer), entry.offset + start)
    if done < buffer.nbytes:
        raise CheckpointError(
            f"{entry.file} ends inside tensor {shown(entry.name)}: {start + done} of "
            f"{entry.nbytes} bytes"
        )


def lacks_weights(folder: Path) -> bool:
    """Return whether weights are missing, all or some of them (an interrupted download)."""
    index = folder / INDEX
    if index.is_file():
        shards = shards_of_index(index, read_json(index))
        return not all(os.path.lexists(folder / shard) for shard in shards)
    held = (*_PICKLES, "*.safetensors")
    return not any(path for pattern in held for path in folder.glob(pattern))


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Return shard file names, each with the tensors the index promises in it (None: no index)."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    if os.path.lexists(folder / INDEX):
        return dict(_read_index(folder / INDEX))
    if os.path.lexists(folder / SINGLE):
        return {SINGLE: None}
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({shown(pickles[0])}), which can run code when "
            f"they are loaded and are not read here. Convert it once where you trust it: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _read_index(path: Path) -> dict[str, set[str]]:
    shards = shards_of_index(path, read_json(path))
    for shard in shards:
        if shard in ("", "..") or not os.path.lexists(path.parent / shard):
            raise CheckpointError(f"{path} names the shard {shown(shard)}, which is missing")
    return shards


def shards_of_index(path: Path, index: dict[str, Any]) -> dict[str, set[str]]:
    """Return tensor names by shard, from the index; raise `CheckpointError` if it is not valid."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{path} places tensor {shown(tensor)} in {shown_value(shard)}, which is not a "
                f"file of the folder"
            )
        shards.setdefault(shard, set()).add(tensor)
    return shards


def _check_index(shard: str, expected: set[str], entries: dict[str, TensorEntry]) -> None:
    missing = sorted(expected - entries.keys())
    if missing:
        raise CheckpointError(
            f"the index promises {shown(missing[0])} in {shown(shard)}, whose header does not have "
            f"it ({len(missing)} such tensors)"
        )
