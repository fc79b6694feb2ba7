"""Move tensors to the device and away from it, beside the computation.

One thread reads what comes next while one sample is computed, another writes what has been
computed. Both hold a bounded number of bytes. On a GPU they copy through pinned memory, on streams
of their own. What leaves a GPU is copied to host memory at once, by a third thread: no memory of
the GPU waits for the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem_gblm.planning.keys import Key
from lowmem_gblm.runtime import accelerator
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
        held: Keys that the current step holds in host memory; set by who begins the step.
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
        self.held: frozenset[Key] = frozenset()
        self.keys_read: set[Key] = set()
        self.keys_written: set[Key] = set()
        self._copied: list[Future[Tensor]] = []
        self._reader = worker("spill-read")
        self._writer = worker("spill-write")
        self._copier = worker("spill-copy")
        self._in, self._out = accelerator.CopyStream(device), accelerator.CopyStream(device)

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *error: object) -> None:
        """Drop what is still on its way."""
        for thread in (self._reader, self._copier, self._writer):
            thread.shutdown(cancel_futures=True)

    def prefetch(
        self, keys: Sequence[Key], order: Sequence[int]
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield for every sample its number and its tensors under these keys, on the device.

        The tensors are not to be modified. A requested stop is raised before the next sample.
        """
        yield from zip(order, self.fetch([[(key, n) for key in keys] for n in order]), strict=True)

    def fetch(
        self, wanted: Sequence[Sequence[tuple[Key, Item]]], *, ahead: bool = True
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of each entry, on the device; `ahead`, the next are read meanwhile.

        They are not to be modified. A requested stop is raised before the next entry.
        """
        keys = {key for entry in wanted for key, _ in entry}
        # What was sent off must have arrived before it can come back.
        self._wait([future for key, _, future in self._behind if key in keys])
        self.keys_read |= keys
        arriving = deque(self._reader.submit(self._fetch, entry) for entry in wanted[:1])
        for following in [*wanted[1:], None]:
            self._progress.check()
            with self._progress.waiting():
                tensors = arriving.popleft().result()
            if following is not None and ahead:
                arriving.append(self._reader.submit(self._fetch, following))
            accelerator.take_over(tensors)
            yield tensors
            del tensors
            if following is not None and not ahead:
                arriving.append(self._reader.submit(self._fetch, following))

    def holds(self, key: Key, item: Item) -> bool:
        """Return whether something was written under a key and item; waits for all writes."""
        self.settle()
        return self._tensors.holds(str(key), item)

    def write_behind(self, key: Key, item: Item, tensor: Tensor) -> None:
        """Write a tensor, unchanged from now on; an OSError may be that of an earlier tensor."""
        self._settle_down_to(self._allowed_bytes - tensor.nbytes)
        ready = accelerator.computed(tensor)
        if ready is None:
            future = self._writer.submit(self._keep(key), str(key), item, tensor)
        else:
            copied = self._copier.submit(self._out.to_host, tensor.detach(), ready)
            self._copied = [one for one in self._copied if not one.done()] + [copied]
            future = self._writer.submit(self._write, self._keep(key), str(key), item, copied)
        self._behind.append((key, tensor.nbytes, future))
        self.keys_written.add(key)
        if not self._allowed_bytes:
            self.settle()

    def leave(self) -> None:
        """Wait until nothing that is to be written is on a GPU any more."""
        with self._progress.waiting():
            for copied in self._copied:
                copied.result()
        self._copied.clear()

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

    def _fetch(self, entry: Sequence[tuple[Key, Item]]) -> tuple[Tensor, ...]:
        """Copy tensors to the device, in the reading thread."""
        empty = partial(accelerator.empty_on_host, device=self._device)
        return tuple(
            self._in.to_device([self._tensors.read(str(key), item, empty) for key, item in entry])
        )

    def _keep(self, key: Key) -> Callable[[str, Item, Tensor], None]:
        """Return what keeps a tensor: in host memory if its key is held there in this step."""
        return self._tensors.hold if key in self.held else self._tensors.write

    def _write(
        self,
        keep: Callable[[str, Item, Tensor], None],
        name: str,
        item: Item,
        copied: Future[Tensor],
    ) -> None:
        """Keep a tensor that comes from a GPU, in the writing thread."""
        keep(name, item, copied.result())
