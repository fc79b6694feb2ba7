"""Move tensors to the device and away from it, beside the computation.

One thread reads the next sample while one is computed, another writes what has been computed. Both
hold a bounded number of bytes. On a GPU they copy through pinned memory on streams of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from lowmem_gblm.planning.steps import Key
from lowmem_gblm.runtime.background import worker
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.storage.tensor_store import Item, TensorStore


def open_store(folder: Path, host_bytes: int, what_to_do: str = "") -> TensorStore:
    """Return the store of a work folder; its names are those of keys of the table of steps."""
    return TensorStore(folder, host_bytes, what_to_do, lambda name: Key.named(name).holds)


class Offload:
    """A mover of tensors between the work folder and the device.

    Args:
        progress: Told how long the computation waits; knows whether the run is to stop.
        behind_bytes: Bytes that may be written behind at once; with 0 a write ends before the call.

    Attributes:
        keys_read, keys_written: Keys that were read and written; for others to look at and clear.
    """

    def __init__(
        self, store: TensorStore, device: torch.device, progress: Progress, behind_bytes: int
    ) -> None:
        self._tensors = store
        self._device = device
        self._progress = progress
        self._allowed_bytes = behind_bytes
        self._behind: deque[tuple[Key, int, Future[None]]] = deque()
        self.keys_read: set[Key] = set()
        self.keys_written: set[Key] = set()
        self._reader = worker("spill-read")
        self._writer = worker("spill-write")
        self._in = self._out = None
        if device.type == "cuda":
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *error: object) -> None:
        """Drop what is still on its way."""
        for thread in (self._reader, self._writer):
            thread.shutdown(cancel_futures=True)

    def prefetch(
        self, keys: Sequence[Key], order: Sequence[int]
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield for every sample its number and its tensors under these keys, on the device.

        The tensors are not to be modified. A requested stop is raised before the next sample.
        """
        # What was sent off must have arrived before it can come back.
        self._wait([future for key, _, future in self._behind if key in keys])
        self.keys_read.update(keys)
        ahead = self._reader.submit(self._fetch, keys, order[0])
        for n, following in zip(order, [*order[1:], None], strict=True):
            self._progress.check()
            with self._progress.waiting():
                tensors = ahead.result()
            if following is not None:
                ahead = self._reader.submit(self._fetch, keys, following)
            for tensor in tensors:
                if tensor.is_cuda:
                    # It came by another stream: not to be used anew before this one is done.
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            yield n, tensors

    def read(self, key: Key, item: Item) -> Tensor:
        """Return a tensor from the work folder, on the CPU; not to be modified."""
        self.keys_read.add(key)
        return self._tensors.read(str(key), item)

    def holds(self, key: Key, item: Item) -> bool:
        """Return whether something was written under a key and item; waits for all writes."""
        self.settle()
        return self._tensors.holds(str(key), item)

    def write_behind(self, key: Key, item: Item, tensor: Tensor) -> None:
        """Write a tensor, unchanged from now on; an OSError may be that of an earlier tensor."""
        self._settle_down_to(self._allowed_bytes - tensor.nbytes)
        ready = torch.cuda.Event() if tensor.is_cuda else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(tensor.device))
        future = self._writer.submit(self._store, key, item, tensor.detach(), ready)
        self._behind.append((key, tensor.nbytes, future))
        self.keys_written.add(key)
        if not self._allowed_bytes:
            self.settle()

    def settle(self) -> None:
        """Wait until all tensors are written."""
        self._settle_down_to(0)

    def in_flight(self) -> tuple[set[str], list[Future[None]]]:
        """Names under which something is still being written or could not be; what to wait for."""
        left = [
            (str(key), future)
            for key, _, future in self._behind
            if not future.done() or future.exception() is not None
        ]
        return {name for name, _ in left}, [future for _, future in left]

    def drop(self, keys: Iterable[Key]) -> None:
        """Drop everything under these keys, once all is written."""
        self.settle()
        for key in keys:
            self._tensors.drop(str(key))

    def _settle_down_to(self, bytes_left: int) -> None:
        total = sum(size for _, size, _ in self._behind)
        while self._behind and total > bytes_left:
            _, size, future = self._behind.popleft()
            self._wait([future])
            total -= size

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        with self._progress.waiting():
            for future in futures:
                future.result()

    def _fetch(self, keys: Sequence[Key], n: int) -> tuple[Tensor, ...]:
        """Copy tensors to the device, in the reading thread."""
        tensors = tuple(self._tensors.read(str(key), n) for key in keys)
        if self._in is None:
            return tensors
        with torch.cuda.stream(self._in):
            copies = tuple(
                tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors
            )
        self._in.synchronize()
        return copies

    def _store(self, key: Key, item: Item, tensor: Tensor, ready: torch.cuda.Event | None) -> None:
        """Write a tensor, in the writing thread; `ready` is when a GPU has computed it."""
        if ready is not None and self._out is not None:
            self._out.wait_event(ready)
            tensor.record_stream(self._out)
            with torch.cuda.stream(self._out):
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                tensor = pinned.copy_(tensor, non_blocking=True)
            self._out.synchronize()
        self._tensors.write(str(key), item, tensor)
