"""One resident decoder block at a time; the next one is read beside the computation."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_gblm.model.bnb import QuantizedKind
from lowmem_gblm.model.matmul_tap import MatmulWeight
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.model.quantized_block import PackedWeights, pack_block
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.sizes import Choices
from lowmem_gblm.runtime.accelerator import CopyStream, empty_on_host, is_accelerator, take_over
from lowmem_gblm.runtime.background import worker
from lowmem_gblm.runtime.memory import give_back_freed
from lowmem_gblm.runtime.progress import Progress
from lowmem_gblm.storage.checkpoint.reader import Checkpoint

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder block whose parameters are resident.

    Attributes:
        raw: The tensors as they are on disk, by name; on a CPU the module may share their memory.
        packed: The matrices of the block, if they are held in 4 or 8 bits.
        pending: Work of other threads that still reads `raw`, whose memory is reused after it.
    """

    index: int
    module: nn.Module
    raw: dict[str, Tensor]
    weights: list[PrunableWeight]
    packed: PackedWeights | None = None
    pending: list[Future[Any]] = field(default_factory=list)

    @property
    def slots(self) -> list[MatmulWeight]:
        """Return the matrices that the block multiplies with, each once."""
        return list(dict.fromkeys(weight.slot for weight in self.weights))

    def on_device(self, weight: PrunableWeight, device: torch.device) -> Tensor:
        """Return a matrix [out, in] in the dtype on disk: on a CPU that of `raw`, else on a GPU."""
        on_disk_OI = weight.on_disk(self.raw[weight.name])
        if self.packed is None and is_accelerator(device):
            resident_OI = weight.in_slot(weight.slot.stored(self.module))
            if resident_OI.dtype == on_disk_OI.dtype:
                return resident_OI
        return on_disk_OI.to(device)

    def replace(self, weight: PrunableWeight, values_OI: Tensor) -> None:
        """Replace a matrix, in `raw` and in the module, by new values from `on_device`.

        What comes from a GPU is in `raw` when the device is synchronized.
        """
        on_disk_OI = weight.on_disk(self.raw[weight.name])
        if values_OI.device != on_disk_OI.device:
            on_disk_OI.copy_(values_OI, non_blocking=True)
        if self.packed is not None:
            stored = self.packed.stored(weight.slot)
            weight.in_slot(stored).copy_(values_OI)
            self.packed.set(weight.slot, stored)
            return
        resident_OI = weight.in_slot(weight.slot.stored(self.module))
        if resident_OI.data_ptr() != values_OI.data_ptr():
            resident_OI.copy_(values_OI)


class BlockLoader:
    """A reader that makes decoder blocks resident in a given order.

    Args:
        progress: Told how long the computation waits for a block.
        weights: The matrices that can be pruned in every block; None if they are not needed.
        choices: Whether the next block is read, and copied to a GPU, while one is resident.
        compute_weights: The bits of resident matrices; None for the dtype of the computation.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        streamed: StreamedModel,
        progress: Progress,
        weights: Sequence[list[PrunableWeight]] | None,
        choices: Choices,
        compute_weights: QuantizedKind | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._streamed = streamed
        self._progress = progress
        self._weights = weights or [[] for _ in range(streamed.depth)]
        self._kind = compute_weights
        ahead = choices.copy_ahead and is_accelerator(streamed.device)
        self._side = CopyStream(streamed.device) if ahead else None
        self._buffer_count = 1 + choices.read_ahead
        self._buffer_bytes = max(self._room(names) for names in streamed.block_tensors)

    def stream(self, order: Sequence[int]) -> Generator[Block, None, None]:
        """Make the blocks of `order` resident; a block is freed when the next one is asked for."""
        if not order:
            return
        # Between streams they are not held: embeddings and head have the memory then.
        buffers = _Buffers(self._buffer_count, self._buffer_bytes, self._streamed.device)
        with worker("read-ahead") as reader:
            try:
                pending = [reader.submit(self._read, index, buffers) for index in order[:1]]
                for index, following in zip(order, [*order[1:], None], strict=True):
                    with self._progress.waiting():
                        arrived = pending.pop().result()
                    if following is not None:
                        pending.append(reader.submit(self._read, following, buffers))
                    users: list[Future[Any]] = []
                    yield self._resident(index, arrived, users)
                    self._streamed.free_block(index)
                    # The consumer may still hold the Block; its tensors are released all the same.
                    arrived.raw.clear()
                    buffers.give_back(arrived.buffer, users)
                    give_back_freed()
            except BaseException:
                # Wherever the exception came from: the reader must not wait for a buffer for ever.
                buffers.stop()
                raise

    def _resident(self, index: int, arrived: _Arrived, pending: list[Future[Any]]) -> Block:
        with self._progress.waiting():
            on_host = self._kind is not None
            self._streamed.load_block(index, arrived.to_load(), on_host=on_host)
        block = Block(
            index=index,
            module=self._streamed.block(index),
            raw=arrived.raw,
            weights=self._weights[index],
            pending=pending,
        )
        if self._kind is None:
            return block
        packed = pack_block(block.module, block.slots, self._kind, self._streamed.device)
        self._streamed.packed[index] = packed
        return replace(block, packed=packed)

    def _read(self, index: int, buffers: _Buffers) -> _Arrived:
        """Return the tensors of a block; called in the reading thread."""
        buffer = buffers.take()
        raw: dict[str, Tensor] = {}
        position = 0
        for name in self._streamed.block_tensors[index]:
            size = self._checkpoint.tensors[name].nbytes
            part = buffer[position : position + size]
            raw[name] = self._checkpoint.read_finite(name, part)
            position += _aligned(size)
        return _Arrived(raw, buffer, self._copied(raw))

    def _copied(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies on the GPU, made beside the computation; none without `copy_ahead`."""
        if self._side is None:
            return {}
        return dict(zip(raw, self._side.to_device(list(raw.values())), strict=True))

    def _room(self, names: Sequence[str]) -> int:
        return sum(_aligned(self._checkpoint.tensors[name].nbytes) for name in names)


@dataclass(frozen=True)
class _Arrived:
    """A block that has been read: its tensors, their buffer, and copies on a GPU."""

    raw: dict[str, Tensor]
    buffer: Tensor
    copies: dict[str, Tensor]

    def to_load(self) -> dict[str, Tensor]:
        """Return the tensors to fill the module with, and give them away."""
        if not self.copies:
            return self.raw
        take_over(list(self.copies.values()))
        copies = dict(self.copies)
        self.copies.clear()
        return copies


class _Buffers:
    """A fixed number of pieces of host memory, each of which holds one block at a time."""

    def __init__(self, count: int, size_bytes: int, device: torch.device) -> None:
        self._free: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)
        self._size_bytes = size_bytes
        self._device = device
        self._stopped = False

    def take(self) -> Tensor:
        buffer = self._free.get()
        if self._stopped:
            raise InterruptedError("no block is wanted any more")
        if buffer is not None:
            return buffer
        return empty_on_host([self._size_bytes], torch.uint8, self._device)

    def stop(self) -> None:
        """Let every thread that waits for a buffer give up."""
        self._stopped = True
        self._free.put(None)

    def give_back(self, buffer: Tensor, after: Sequence[Future[Any]]) -> None:
        """Let a buffer be reused once all of `after` is done."""
        waiting = [one for one in after if not one.done()]
        if not waiting:
            self._free.put(buffer)
            return
        waiting[0].add_done_callback(lambda _: self.give_back(buffer, waiting[1:]))


def _aligned(size_bytes: int) -> int:
    """Round up to the next multiple of a cache line, where the next tensor may begin."""
    return size_bytes + -size_bytes % _ALIGNMENT_BYTES
