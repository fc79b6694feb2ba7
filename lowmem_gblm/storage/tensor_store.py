"""Tensors stored outside the device: hidden states between blocks, gradient magnitudes.

A store holds as much as it may in host memory and the rest in files of the work folder, one file
per name, so that memory does not depend on the number of blocks or samples.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.atomic import PendingFile, temporary_name
from lowmem_gblm.storage.checkpoint.header import DTYPE_NAMES, DTYPES
from lowmem_gblm.storage.checkpoint.reader import raw_bytes
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.raw_io import read_at

# A calibration sample by its number, or a matrix by its name.
Item = int | str
Empty = Callable[..., torch.Tensor]
# Of one name: for every item its place, dtype and shape, as the journal keeps it.
Table = list[tuple[Item, int, str, list[int]]]


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in its file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorStore:
    """Named tensors: written, read any number of times, dropped when no longer needed.

    An item that is written again before it is published replaces the former one. Threads may use
    the store at the same time, each for other names or for written items.

    Of all tensors, `host_bytes` may stay in host memory. For messages, `holds` says what is stored
    under a name, and `what_to_do` what to do where a file is damaged.
    """

    def __init__(
        self, folder: Path, host_bytes: int, what_to_do: str, holds: Callable[[str], str]
    ) -> None:
        self._folder = folder
        self._room_bytes = host_bytes
        self._what_to_do = what_to_do
        self._holds = holds
        self._held: dict[tuple[str, Item], torch.Tensor] = {}
        self._transient: dict[tuple[str, Item], torch.Tensor] = {}
        self._places: dict[tuple[str, Item], _Place] = {}
        self._growing: dict[str, PendingFile] = {}
        self._lock = Lock()

    def hold(self, name: str, item: Item, tensor: torch.Tensor) -> None:
        """Keep a CPU tensor, unchanged from now on, in host memory, whatever is free."""
        with self._lock:
            self._transient[name, item] = tensor.detach()

    def write(self, name: str, item: Item, tensor: torch.Tensor) -> None:
        """Keep a copy of `tensor` (any device) under a name and an item number."""
        tensor = tensor.detach()
        size = tensor.nbytes
        with self._lock:
            former = self._held.pop((name, item), None)
            self._room_bytes += 0 if former is None else former.nbytes
            room = size <= self._room_bytes
            self._room_bytes -= size * room
            if not room and name not in self._growing:
                self._growing[name] = PendingFile(self._path(name), self._holds(name))
        if room:
            tensor = tensor.to("cpu", copy=True)
            with self._lock:
                self._held[name, item] = tensor
            return
        tensor = tensor.to("cpu").contiguous()
        offset = self._growing[name].append(raw_bytes(tensor))
        with self._lock:
            self._places[name, item] = _Place(offset, tensor.dtype, tuple(tensor.shape))

    def holds(self, name: str, item: Item) -> bool:
        """Return whether something was written under this name and item."""
        kept: tuple[Mapping[tuple[str, Item], object], ...]
        kept = (self._transient, self._held, self._places)
        return any((name, item) in one for one in kept)

    def read(self, name: str, item: Item, empty: Empty = torch.empty) -> torch.Tensor:
        """Return the tensor, on the CPU, not to be modified; a damaged file raises `JobError`.

        `empty` makes the tensor that is read into, from `shape` and `dtype`.
        """
        held = self._transient.get((name, item), self._held.get((name, item)))
        if held is not None:
            return held if empty is torch.empty else empty(held.shape, dtype=held.dtype).copy_(held)
        place = self._places[name, item]
        tensor = empty(place.shape, dtype=place.dtype)
        path, view = self._path(name), raw_bytes(tensor)
        with os.fdopen(self._opened(path), "rb", 0) as file, blamed(path, self._holds(name)):
            count = read_at(file.fileno(), view, place.offset)
        if count < len(view):
            raise self._damaged(path)
        return tensor

    def written(self) -> list[str]:
        """Return the names that have been written to and are not durable yet."""
        with self._lock:
            return list(self._growing)

    def publish(self, names: Iterable[str]) -> dict[str, Table]:
        """Make what was written under these names durable and final; return tables for `adopt`."""
        tables = {}
        for name in names:
            self._growing[name].publish()
            with self._lock:
                del self._growing[name]
                tables[name] = self._table(name)
        return tables

    def adopt(self, tables: Mapping[str, Any]) -> None:
        """Take over files that an earlier run has published; raise `JobError` if one is damaged."""
        for name, table in tables.items():
            end = 0
            for item, offset, dtype, shape in table:
                place = _Place(offset, DTYPES[dtype], tuple(shape))
                self._places[name, item] = place
                end = max(end, offset + place.dtype.itemsize * torch.Size(shape).numel())
            path = self._path(name)
            if not path.is_file() or path.stat().st_size != end:
                raise self._damaged(path)

    def drop(self, name: str) -> None:
        """Remove everything under `name`."""
        with self._lock:
            for key in [key for key in self._held if key[0] == name]:
                self._room_bytes += self._held.pop(key).nbytes
            for kept in (self._places, self._transient):
                for key in [key for key in kept if key[0] == name]:
                    del kept[key]
            growing = self._growing.pop(name, None)
        if growing is not None:
            growing.discard()
        self._path(name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Discard all that was not published."""
        for growing in self._growing.values():
            growing.discard()
        self._growing.clear()
        self._held.clear()
        self._transient.clear()

    def _table(self, name: str) -> Table:
        return [
            (item, place.offset, DTYPE_NAMES[place.dtype], list(place.shape))
            for (other, item), place in self._places.items()
            if other == name
        ]

    def _opened(self, path: Path) -> int:
        """Open a file for reading; another thread may be just about to publish it."""
        for candidate in (path, temporary_name(path), path):
            try:
                return os.open(candidate, os.O_RDONLY)
            except FileNotFoundError:
                continue
        raise self._damaged(path)

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _damaged(self, path: Path) -> JobError:
        found = f"{path} is missing or damaged: look at the disk"
        return JobError(f"{found}; {self._what_to_do}" if self._what_to_do else found)
