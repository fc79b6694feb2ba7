"""How fast this machine multiplies, moves memory, reads and writes: each is measured briefly.

Every function takes about `seconds`, or longer where a single call does.
"""

import logging
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lowmem_gblm.runtime import accelerator
from lowmem_gblm.runtime.machine import free_disk_bytes, nearest_folder

_PROBE_BYTES, _ACCELERATOR_PROBE_BYTES = 256 << 20, 2 << 30
_PIECE_BYTES = 8 << 20
_LONGEST_FILE_BYTES = 128 << 20
# The first product is sized for a machine of this rate; its time tells the size of the second.
_FIRST_FLOPS_S = 1e10
_CALLS = 8
_SIDE_STEP = 64


def probe_bytes(device: torch.device) -> int:
    """Return the most memory of a device that a measurement may take."""
    if not accelerator.is_accelerator(device):
        return _PROBE_BYTES
    return min(_ACCELERATOR_PROBE_BYTES, accelerator.free_bytes(device) // 2)


def flops_rate(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    *,
    limit_bytes: int,
    seconds: float = 0.8,
) -> float:
    """Measure the FLOP/s of multiplications with the matrices of a block.

    Args:
        dtype: Of the numbers; float16 becomes float32 on a CPU, as it does in a run.
        shapes: `[out, in]` of every matrix of a block, as often as it is in it; not empty.
        tokens: Rows of the input.
        limit_bytes: Most memory it takes, half of which is left to what libraries pack.
    """
    if dtype == torch.float16 and not accelerator.is_accelerator(device):
        dtype = torch.float32
    counts = Counter(shapes)
    like = torch.empty(0, device=device, dtype=dtype)
    limit_numbers = limit_bytes // 2 // dtype.itemsize
    rate = partial(_product_rate, like, tokens, limit_numbers, seconds / len(counts))
    spent = sum(count * math.prod(shape) / rate(*shape) for shape, count in counts.items())
    return sum(map(math.prod, shapes)) / spent


def memory_rate(device: torch.device, *, limit_bytes: int, seconds: float = 0.1) -> float:
    """Measure the bytes per second that an elementwise pass over float32 reads and writes."""
    source = torch.ones(limit_bytes // 4 // torch.float32.itemsize, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(partial(torch.abs, source, out=target), seconds, device)


def read_rate(file: Path | None, folder: Path, *, seconds: float = 0.3) -> float:
    """Measure the bytes per second of reading 8 MiB from random places of a file.

    The file is a shard of the model, on the disk or in the system's cache as it is. For None, a
    file is written to `folder` and read back, past the cache where the system allows it.
    """
    with _nameless_file(folder) if file is None else file.open("rb") as opened:
        if file is None:
            _append(opened, os.urandom(_PIECE_BYTES), _PIECE_BYTES)
        descriptor = opened.fileno()
        length = min(_PIECE_BYTES, os.fstat(descriptor).st_size)
        last = os.fstat(descriptor).st_size - length
        draw = random.Random(0)

        def read() -> None:
            if file is None and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(descriptor, length, draw.randint(0, last))

        return length / _seconds(read, seconds)


def write_rate(folder: Path, *, seconds: float = 0.3) -> float:
    """Measure the bytes per second of writing 8 MiB to the disk of a folder, and flushing them."""
    # Bytes that are all alike might be packed by the file system, or never written at all.
    piece = os.urandom(_PIECE_BYTES)
    longest = min(_LONGEST_FILE_BYTES, free_disk_bytes(folder) // 4)
    with _nameless_file(folder) as file:
        return len(piece) / _seconds(partial(_append, file, piece, longest), seconds)


def product_side(inputs: int, limit_numbers: int, limit_flops: float) -> int:
    """Return how many rows, and how many outputs, a product may have: at least 1.

    Input, weight and output count as numbers. `inputs`, along which a product sums, is kept; rows
    and outputs are cut to the same length, because a slim product runs slower.
    """
    within_memory = math.isqrt(inputs**2 + limit_numbers) - inputs
    side = min(within_memory, math.isqrt(int(limit_flops) // (2 * inputs)))
    return max(1, side // _SIDE_STEP * _SIDE_STEP or side)


def _product_rate(
    like: Tensor, tokens: int, limit_numbers: int, seconds: float, out: int, inputs: int
) -> float:
    """Measure the FLOP/s of `[T, in] x [in, out]`, of which as much is computed as fits."""
    rate = _FIRST_FLOPS_S
    for share in (0.25, 0.75):
        side = product_side(inputs, limit_numbers, rate * seconds / _CALLS)
        input_TI = like.new_empty(min(tokens, side), inputs).uniform_()
        weight_OI = like.new_empty(min(out, side), inputs).uniform_()
        out_TO = like.new_empty(len(input_TI), len(weight_OI))
        multiply = partial(torch.mm, input_TI, weight_OI.T, out=out_TO)
        rate = 2 * out_TO.numel() * inputs / _seconds(multiply, share * seconds, like.device)
    return rate


def _nameless_file(folder: Path) -> IO[bytes]:
    """Return an open file that is gone when it is closed, or when the process is killed."""
    return tempfile.TemporaryFile(dir=nearest_folder(folder))


def _append(file: IO[bytes], piece: bytes, longest_bytes: int) -> None:
    """Write at the end of a file, because overwriting is faster; empty a file that is too long."""
    if file.tell() + len(piece) > longest_bytes:
        file.seek(0)
        file.truncate()
    file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _seconds(
    action: Callable[[], object], seconds: float, device: torch.device = accelerator.CPU
) -> float:
    """Measure the mean seconds of an action: a stall counts, as it does in a run."""
    # Where CUDA is installed and no GPU is there, the import warns of it on stderr.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # The import takes 40 ms and 3 MiB, which only a plan with times has to pay.
    from torch.utils.benchmark import Timer

    def now() -> float:
        accelerator.synchronize(device)
        return time.perf_counter()

    threads = torch.get_num_threads()
    timer = Timer("action()", timer=now, globals={"action": action}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=seconds).mean
