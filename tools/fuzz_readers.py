"""The loop of tools/fuzz: gives inputs to the readers of headers and indexes, and judges them.

A reader may refuse an input with a `CheckpointError` of one readable line, or accept it, and then
every tensor must lie within its file and apart from the others, and every shard in its folder.
Nothing here touches the disk: the readers are given the bytes and the size that a file would have.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz_inputs import SIZES, header_input, index_input

from lowmem_gblm.errors import CheckpointError
from lowmem_gblm.storage.checkpoint.header import (
    DTYPE_NAMES,
    TensorEntry,
    header_length,
    parse_header,
)
from lowmem_gblm.storage.checkpoint.reader import shards_of_index
from lowmem_gblm.storage.checkpoint.strict_json import parse_json

FILE = Path("model.safetensors")
INDEX = Path("model.safetensors.index.json")
PACKAGE = str(Path(parse_json.__code__.co_filename).parents[1])
LIMIT_S = 1.0
MOST_MEMORY_BYTES = 128 << 20
LONGEST_LINE = 3000
_HEADERS = 0.75
_SEED_BITS = 40


class Finding(Exception):
    """An input on which a reader did what it must not.

    Attributes:
        number: Number of the input.
        content: Bytes that were read.
    """

    def __init__(self, number: int, content: bytes, what: str) -> None:
        super().__init__(what)
        self.number = number
        self.content = content


@dataclass(kw_only=True)
class Figures:
    """The outcome of the inputs.

    Attributes:
        accepted: Number of accepted inputs.
        refused: Number of refusals at each place of the package: "header.py:93".
        seconds: Seconds for all inputs.
        slowest_s: Seconds for the slowest input, once drawn.
        memory_bytes: Growth of the peak of resident memory.
    """

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest_s: float = 0.0
    memory_bytes: int = 0


def fuzz(inputs: int, seed: int, first: int = 0) -> Figures:
    """Try inputs number `first` and following; every one is drawn from its seed and number alone.

    Raises:
        Finding: A reader crashed, hung, took too much memory, or accepted a wrong value.
    """
    figures = Figures()
    draw = Random()
    began, peak = time.perf_counter(), _peak_bytes()
    with _alarms():
        for number in range(first, first + inputs):
            draw.seed(seed << _SEED_BITS | number)
            _try(draw, number, figures)
            figures.memory_bytes = _peak_bytes() - peak
            if figures.memory_bytes > MOST_MEMORY_BYTES:
                raise Finding(number, b"", f"resident memory grew by {figures.memory_bytes} bytes")
    figures.seconds = time.perf_counter() - began
    return figures


def _try(draw: Random, number: int, figures: Figures) -> None:
    if draw.random() < _HEADERS:
        content, size, valid = header_input(draw)
    else:
        content, valid = index_input(draw)
        size = None
    began = time.perf_counter()
    try:
        with _alarm():
            _judge(content, size, valid, figures)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Finding(number, content, f"{type(error).__name__}: {error}") from error
    figures.slowest_s = max(figures.slowest_s, time.perf_counter() - began)


def _judge(content: bytes, size: int | None, valid: bool, figures: Figures) -> None:
    """Raise if a reader did what it must not; `size` is None for an index."""
    try:
        if size is None:
            _check_shards(shards_of_index(INDEX, parse_json(INDEX, content)))
        else:
            length = header_length(FILE, content[:8], size)
            header = content[8 : 8 + length]
            _check_entries(parse_header(FILE, header, size), 8 + len(header), size)
        figures.accepted += 1
    except CheckpointError as error:
        _check_message(str(error), valid)
        figures.refused[_place(error)] += 1


def _check_message(line: str, valid: bool) -> None:
    assert not valid, f"a valid input was refused: {line}"
    assert line.isprintable(), f"the message is not one readable line: {line!r}"
    assert len(line) <= LONGEST_LINE, f"the message has {len(line)} characters"


def _check_entries(entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        assert name == entry.name == name.encode().decode()
        numbers = (entry.offset, entry.nbytes, *entry.shape)
        assert all(type(one) is int and one >= 0 for one in numbers), entry
        assert entry.nbytes == math.prod(entry.shape) * SIZES[DTYPE_NAMES[entry.dtype]], entry
        assert entry.offset >= position, f"{name} overlaps with the one before it, or the header"
        position = entry.offset + entry.nbytes
    assert position <= size, "a tensor ends beyond the file"


def _check_shards(shards: dict[str, set[str]]) -> None:
    assert shards
    for shard, tensors in shards.items():
        assert not {"/", "\\"} & set(shard), f"{shard!r} leaves the folder"
        assert tensors
        assert all(isinstance(one, str) for one in tensors)


@contextmanager
def _alarm() -> Iterator[None]:
    """Run the body; raise `TimeoutError` in the middle if it takes too long."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _alarms() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def _place(error: CheckpointError) -> str:
    """Return the place in the package where an error began, as "header.py:93"."""
    trace = (error.__context__ or error).__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(PACKAGE):
            place = f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
