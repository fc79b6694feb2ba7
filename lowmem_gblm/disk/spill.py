"""Tensors that wait outside the device: hidden states between blocks, gradient magnitudes.

A spill holds as much as it may in host memory and the rest in files of the work folder, so that
memory does not depend on how many blocks or samples there are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lowmem_gblm.disk.checkpoint import raw_bytes
from lowmem_gblm.disk.folder import OwnFolder


class Spill:
    """Named tensors, written once, read any number of times, dropped when no longer needed.

    Args:
        folder: Work folder; created, and removed on leaving the `with`.
        host_bytes: How much may stay in host memory.
    """

    def __init__(self, folder: Path, host_bytes: int = 0) -> None:
        self._folder = OwnFolder(folder)
        self._room_bytes = host_bytes
        self._held: dict[tuple[str, int], torch.Tensor] = {}
        self._files: dict[tuple[str, int], tuple[torch.dtype, torch.Size]] = {}

    def write(self, name: str, item: int, tensor: torch.Tensor) -> None:
        """Keep a copy of `tensor` (any device) under a name and an item number."""
        tensor = tensor.detach()
        size = tensor.nbytes
        if size <= self._room_bytes:
            self._room_bytes -= size
            self._held[name, item] = tensor.to("cpu", copy=True)
            return
        self._path(name).mkdir(exist_ok=True)
        path = self._path(name) / str(item)
        try:
            path.write_bytes(raw_bytes(tensor.to("cpu").contiguous()))
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        self._files[name, item] = (tensor.dtype, tensor.shape)

    def holds(self, name: str, item: int) -> bool:
        """Whether something was written under this name and item."""
        return (name, item) in self._held or (name, item) in self._files

    def read(self, name: str, item: int) -> torch.Tensor:
        """The tensor, on the CPU; not to be modified."""
        if (name, item) in self._held:
            return self._held[name, item]
        dtype, shape = self._files[name, item]
        tensor = torch.empty(shape, dtype=dtype)
        with open(self._path(name) / str(item), "rb") as file:
            count = file.readinto(raw_bytes(tensor))
        assert count == tensor.nbytes, f"spilled tensor {name}/{item} was cut short"
        return tensor

    def drop(self, name: str) -> None:
        """Forget everything under `name`."""
        for key in [key for key in self._held if key[0] == name]:
            self._room_bytes += self._held.pop(key).nbytes
        for key in [key for key in self._files if key[0] == name]:
            del self._files[key]
        shutil.rmtree(self._path(name), ignore_errors=True)

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        """Forget everything and remove the folder."""
        self._held.clear()
        self._files.clear()
        self._folder.remove()

    def _path(self, name: str) -> Path:
        return self._folder.path / name
