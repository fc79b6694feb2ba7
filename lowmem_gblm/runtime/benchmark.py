"""How fast this machine is at what a run does: a little of everything, timed."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowmem_gblm.runtime.machine import free_disk_bytes, nearest_folder
from lowmem_gblm.runtime.memory import give_back_freed

PROBE_BYTES = 256 << 20

_ROUNDS = 3
_GROWTH = 4
_SHORTEST_S = 0.005
_FIRST_OUTPUTS = 1 << 14
_NUMBERS = 1 << 16
_STREAM_BYTES = 64 << 20
_PIECE_BYTES = 4 << 20
# Shares of the time.
_PRODUCTS, _WRITE, _READ, _STREAM = 0.5, 0.2, 0.2, 0.1


@dataclass(frozen=True, kw_only=True)
class MachineSpeed:
    """What was measured.

    Attributes:
        products: FLOP/s of multiplications with weights.
        read_bytes_s: From the file as it lies, on the disk or in the system's cache.
        write_bytes_s: To the disk, flushed.
        memory_bytes_s: Bytes read and written in elementwise passes over float32 tensors.
    """

    products: float
    read_bytes_s: float
    write_bytes_s: float
    memory_bytes_s: float


def measure_machine(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    read_from: Path | None,
    write_to: Path,
    *,
    seconds: float = 2.0,
    limit_bytes: int = PROBE_BYTES,
) -> MachineSpeed:
    """Time products, elementwise passes, reading and writing.

    Args:
        device: Where products and elementwise passes are timed.
        dtype: Of the products; float16 becomes float32 on a CPU, as it does in a run.
        shapes: `[out, in]` of every matrix of a block, as often as it is in it; not empty.
        tokens: Rows of the input of a product.
        read_from: A shard of the model: read at places all over it, cold or warm as it is. None:
            what was written is read back, after the system was asked to drop it from its cache.
        write_to: A folder, which need not exist yet, on the disk that will be written to. The
            file has no name there and is gone when this returns or is killed.
        seconds: About how long it takes.
        limit_bytes: Most memory it takes at once, and most bytes it writes.

    Raises:
        OSError: The shard cannot be read, or the folder not be written to.
    """
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    room = limit_bytes // dtype.itemsize
    try:
        read, write = _disk_rates(read_from, write_to, seconds, limit_bytes)
        return MachineSpeed(
            products=_products(device, dtype, shapes, tokens, _PRODUCTS * seconds, room),
            read_bytes_s=read,
            write_bytes_s=write,
            memory_bytes_s=_memory_rate(device, _STREAM * seconds, limit_bytes),
        )
    finally:
        give_back_freed()


def fitting(tokens: int, out: int, inputs: int, room: int) -> tuple[int, int]:
    """How much of T and out is left of `[T, in] x [in, out]` that fits a number of elements.

    Input, weight and output count. `in`, along which a product sums, is kept, and the two others
    are cut evenly, because a slim product runs slower.
    """
    side = math.isqrt(inputs * inputs + room) - inputs
    if tokens <= side:
        out = min(out, (room - tokens * inputs) // (inputs + tokens))
    elif out <= side:
        tokens = min(tokens, (room - out * inputs) // (inputs + out))
    else:
        tokens, out = side, side
    return max(1, tokens), max(1, out)


@dataclass
class _Product:
    """The product of one matrix shape, of which as much is computed as fits the time."""

    input_TI: Tensor
    weight_OI: Tensor
    out: Tensor
    tokens: int = 1
    outputs: int = 1
    timings_s: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        tokens: int,
        room: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Product:
        rows, outputs = fitting(tokens, *shape, room)
        return cls(
            _random((rows, shape[1]), device, dtype),
            _random((outputs, shape[1]), device, dtype),
            torch.empty(rows * outputs, device=device, dtype=dtype),
        )

    def __call__(self) -> None:
        out_TO = self.out[: self.tokens * self.outputs].view(self.tokens, self.outputs)
        torch.mm(self.input_TI[: self.tokens], self.weight_OI[: self.outputs].T, out=out_TO)

    @property
    def rate(self) -> float:
        """FLOP/s."""
        inputs = self.input_TI.shape[1]
        return 2 * self.tokens * self.outputs * inputs / statistics.median(self.timings_s)

    def grow(self, device: torch.device, aim_s: float) -> None:
        """Take as much of T and out as fills about `aim_s`; this warms the product up, too."""
        most = self.input_TI.shape[0], self.weight_OI.shape[0]
        size = _FIRST_OUTPUTS
        while True:
            side = math.isqrt(size)
            self.tokens = min(most[0], max(side, size // most[1]))
            self.outputs = min(most[1], max(side, size // most[0]))
            # The shortest of a few: where other programs run, a stall must not end the growth.
            best = min(_timed(self, device) for _ in range(_ROUNDS))
            if 2 * best > aim_s or size >= math.prod(most):
                return
            size *= _GROWTH


def _products(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    seconds: float,
    room: int,
) -> float:
    """FLOP/s over all matrices of a block.

    Every round goes through all shapes, so that none finds its operands in a cache because it was
    just timed.
    """
    counts = Counter(shapes)
    # Half of the room is left to what libraries pack operands into.
    share = room // 2 // len(counts)
    end = time.perf_counter() + seconds
    products = {shape: _Product.of(shape, tokens, share, device, dtype) for shape in counts}
    for product in products.values():
        product.grow(device, seconds / len(counts) / (_ROUNDS + 3))
    rounds = 0
    while rounds < _ROUNDS or time.perf_counter() < end:
        rounds += 1
        for product in products.values():
            product.timings_s.append(_timed(product, device))
    flops = {shape: math.prod(shape) * count for shape, count in counts.items()}
    return sum(flops.values()) / sum(flops[one] / products[one].rate for one in counts)


def _memory_rate(device: torch.device, seconds: float, limit_bytes: int) -> float:
    """Bytes per second, read and written, of a pass from one float32 tensor to another."""
    count = min(_STREAM_BYTES, limit_bytes // 2) // torch.float32.itemsize
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        torch.abs(source, out=target)

    run()
    timings_s: list[float] = []
    end = time.perf_counter() + seconds
    while len(timings_s) < _ROUNDS or time.perf_counter() < end:
        timings_s.append(_timed(run, device))
    return (source.nbytes + target.nbytes) / statistics.median(timings_s)


def _timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds of an action; of a short one, the mean of many."""
    seconds, count = 0.0, 1
    while True:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            action()
        _synchronize(device)
        seconds = time.perf_counter() - start
        if seconds >= _SHORTEST_S:
            return seconds / count
        count = max(2 * count, math.ceil(count * _SHORTEST_S / max(seconds, 1e-9)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of a few random numbers over and over: drawing every one would take longer."""
    numbers = torch.randn(_NUMBERS, device=device).to(dtype)
    count = math.prod(shape)
    return numbers.repeat(math.ceil(count / _NUMBERS))[:count].view(shape)


def _disk_rates(
    read_from: Path | None, write_to: Path, seconds: float, limit_bytes: int
) -> tuple[float, float]:
    """Bytes per second of reading and of writing."""
    folder = nearest_folder(write_to)
    # Bytes that are all alike might be packed by the file system, or never written at all.
    pieces = max(1, min(_STREAM_BYTES, limit_bytes) // _PIECE_BYTES)
    buffer = memoryview(bytearray(os.urandom(_PIECE_BYTES)) * pieces)
    most = min(limit_bytes, free_disk_bytes(folder) // 4)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        descriptor = file.fileno()
        written, write = _write_rate(descriptor, buffer, _WRITE * seconds, most)
        if read_from is None:
            _forget(descriptor)
            return _read_rate(descriptor, written, buffer, _READ * seconds, most), write
    descriptor = os.open(read_from, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return _read_rate(descriptor, size, buffer, _READ * seconds, limit_bytes), write
    finally:
        os.close(descriptor)


def _write_rate(
    descriptor: int, buffer: memoryview, seconds: float, most: int
) -> tuple[int, float]:
    """Bytes written, and bytes per second of the last and largest piece; every one is flushed."""
    start, written, length = time.perf_counter(), 0, _PIECE_BYTES
    while True:
        began = time.perf_counter()
        end = written + length
        while written < end:
            written += os.pwrite(descriptor, buffer[: end - written], written)
        os.fsync(descriptor)
        now = time.perf_counter()
        length *= 2
        if written + length > most or now - start + 2 * (now - began) > seconds:
            return written, length / 2 / (now - began)


def _read_rate(descriptor: int, size: int, buffer: memoryview, seconds: float, most: int) -> float:
    """Bytes per second of pieces from all over a file; a small file is read more than once."""
    pieces = max(1, min(size, most) // _PIECE_BYTES)
    start, done, number = time.perf_counter(), 0, 0
    while True:
        place = number * _PIECE_BYTES % len(buffer)
        part = buffer[place : place + min(size, _PIECE_BYTES)]
        done += os.preadv(descriptor, [part], size * (number % pieces) // pieces)
        number += 1
        elapsed = time.perf_counter() - start
        if elapsed >= (_SHORTEST_S if number >= pieces else seconds):
            return done / elapsed


def _forget(descriptor: int) -> None:
    """Ask the system to drop a file from its cache, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
