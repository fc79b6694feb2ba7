"""Inputs for tools/fuzz: headers and indexes that are valid, nearly valid, or nothing of the kind.

A header begins as a valid one, is changed a few times in its meaning (a shape, an offset, a second
tensor of that name), and then now and then in its bytes. So most inputs get past the first check,
and every later check is reached.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPES = list(SIZES)
METADATA = "__metadata__"
NAMES = ["w", "model.layers.0.mlp.up_proj.weight", "", "é", "a\nb", "\x1b[2J", "x" * 300, METADATA]
SHARDS = [
    "a.safetensors", "model-00001-of-00002.safetensors", "", ".", "..", "../a", "/etc/passwd",
    "a/b", "a\\b", "a\0b", "a\n", "./a", "a/", "~", "x" * 300, "\u202e", "C:a",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 7, 8, 255, 2**16, 2**31, 2**32, 2**53, 2**61, 2**62, 2**62 + 1, 2**63, 2**64,
    2**70, -(2**63), 10**300,
]  # fmt: skip
STRUCTURE = b'{}[]:,"\\0-.eEtfnu \n\x00\x80\xff'
PADDINGS = [b"", b" ", b"        ", b"\n", b"\x00", b"}", b",", b"\xef\xbb\xbf"]


class Pairs(list[Any]):
    """A JSON object whose names may repeat, as a list of [name, value]."""


class Raw(str):
    """Text that goes into the JSON as it is."""


ODD_TEXTS = [
    Raw(text)
    for text in (
        "NaN", "-Infinity", "1e999", "-1e999", "1e400000000", "9" * 4300, "9" * 5000, "0x10", "01",
        "+1", "1.0", "1e3", "-0", "nul", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"', "'w'",
        "", "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000,
    )
]  # fmt: skip
# Large, so rarely drawn.
WHOLES = [
    Raw("[" * 1_100_000),
    Raw("[" + "{}," * 500_000 + "{}]"),
    Raw('"' + "x" * (33 << 20) + '"'),
]
PLAIN = [None, True, False, 0.5, "", "F32", "F4", "f32", "I64 ", [], {}, [[]], [None], {"a": 1}]


def junk(draw: Random) -> Any:
    """Return any value, rarely the right one."""
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(NUMBERS)
    if kind < 0.6:
        return draw.choice(PLAIN)
    if kind < 0.75:
        return draw.choice(ODD_TEXTS)
    return [draw.choice(NUMBERS) for _ in range(draw.choice((1, 2, 2, 3, 17, 200)))]


def valid_tensors(draw: Random) -> tuple[Pairs, int]:
    """Return descriptions as the format demands, and the bytes of data they account for."""
    tensors = Pairs()
    position = 0
    for number in range(draw.randrange(6)):
        dtype = draw.choice(DTYPES)
        shape = [draw.choice((0, 1, 2, 3, 5, 64, 4096)) for _ in range(draw.randrange(5))]
        size = math.prod(shape) * SIZES[dtype]
        fields = [["dtype", dtype], ["shape", shape], ["data_offsets", [position, position + size]]]
        draw.shuffle(fields)
        name = f"{draw.choice(NAMES[:5])}{number}"
        tensors.append([name, Pairs(fields)])
        position += size
    draw.shuffle(tensors)
    if draw.random() < 0.5:
        tensors.insert(0, [METADATA, {"format": "pt"}])
    return tensors, position


def header_input(draw: Random) -> tuple[bytes, int, bool]:
    """Return the beginning of a file, as far as its header goes or further, and the file's size.

    Returns:
        Bytes, size, and whether nothing was changed, so that it must be accepted.
    """
    if draw.random() < 0.04:
        raw = draw.randbytes(draw.randrange(64))
        return raw, len(raw) + draw.randrange(3), False
    if draw.random() < 0.01:
        text = _text(draw.choice(WHOLES) if draw.random() < 0.1 else junk(draw)).encode()
        return len(text).to_bytes(8, "little") + text, 8 + len(text), False
    tensors, data_bytes = valid_tensors(draw)
    changes = draw.choice((0, 1, 1, 1, 2, 2, 4))
    for _ in range(changes):
        if tensors:
            draw.choice(CHANGES)(draw, tensors)
    text = _text(tensors).encode("utf-8", "surrogatepass")
    text = _damaged(draw, text) if draw.random() < 0.25 else text
    whole = not changes and text == _text(tensors).encode()
    length, size = len(text), 8 + len(text) + data_bytes
    if draw.random() < 0.1:
        length, whole = (
            max(0, draw.choice((length - 1, length + 1, 0, size, 2**63, 2**64 - 1))),
            False,
        )
    if draw.random() < 0.1:
        size, whole = max(0, draw.choice((size - 1, size + 1, 0, 8, 2**50, len(text)))), False
    return length.to_bytes(8, "little") + text, size, whole


def index_input(draw: Random) -> tuple[bytes, bool]:
    """Return the content of an index.

    Returns:
        Bytes, and whether they must be accepted.
    """
    if draw.random() < 0.04:
        return draw.randbytes(draw.randrange(64)), False
    if draw.random() < 0.01:
        return _text(junk(draw)).encode(), False
    shards = SHARDS[:2] if draw.random() < 0.5 else SHARDS
    places = Pairs([f"w{number}", draw.choice(shards)] for number in range(draw.randrange(1, 6)))
    index = Pairs([["metadata", {"total_size": 8}], ["weight_map", places]])
    whole = shards is not SHARDS
    for _ in range(draw.choice((0, 1, 1, 2))):
        where = draw.choice((index, places))
        if where:
            whole = False
            draw.choice(CHANGES_OF_PAIRS)(draw, where)
    text = _text(index).encode("utf-8", "surrogatepass")
    if draw.random() < 0.25:
        return _damaged(draw, text), False
    return text, whole


def _change_field(draw: Random, tensors: Pairs) -> None:
    fields = draw.choice(tensors)[1]
    if isinstance(fields, Pairs) and fields:
        draw.choice(fields)[1] = junk(draw)


def _change_number(draw: Random, tensors: Pairs) -> None:
    """Change a shape or an offset a little."""
    fields = draw.choice(tensors)[1]
    if not isinstance(fields, Pairs):
        return
    lists = [value for _, value in fields if isinstance(value, list)]
    if lists and (numbers := draw.choice(lists)):
        at = draw.randrange(len(numbers))
        if isinstance(numbers[at], int):
            numbers[at] += draw.choice((-8, -4, -1, 1, 4, 8, numbers[at], 2**40))


def _change_pairs_of_tensor(draw: Random, tensors: Pairs) -> None:
    fields = draw.choice(tensors)[1]
    if isinstance(fields, Pairs) and fields:
        draw.choice(CHANGES_OF_PAIRS)(draw, fields)


def _change_pairs(draw: Random, tensors: Pairs) -> None:
    draw.choice(CHANGES_OF_PAIRS)(draw, tensors)


def _swap(draw: Random, pairs: Pairs) -> None:
    """Exchange the values of two names."""
    one, other = draw.choice(pairs), draw.choice(pairs)
    one[1], other[1] = other[1], one[1]


def _repeat(draw: Random, pairs: Pairs) -> None:
    pairs.insert(draw.randrange(len(pairs) + 1), list(draw.choice(pairs)))


def _drop(draw: Random, pairs: Pairs) -> None:
    del pairs[draw.randrange(len(pairs))]


def _rename(draw: Random, pairs: Pairs) -> None:
    draw.choice(pairs)[0] = draw.choice(NAMES)


def _replace(draw: Random, pairs: Pairs) -> None:
    draw.choice(pairs)[1] = junk(draw)


def _add(draw: Random, pairs: Pairs) -> None:
    pairs.append([draw.choice(NAMES), junk(draw)])


CHANGES_OF_PAIRS: list[Callable[[Random, Pairs], None]] = [
    _swap, _repeat, _drop, _rename, _replace, _add,
]  # fmt: skip
CHANGES: list[Callable[[Random, Pairs], None]] = [
    _change_field, _change_number, _change_number, _change_pairs_of_tensor, _change_pairs,
]  # fmt: skip


def _text(value: Any) -> str:
    """Return JSON, with names that repeat and texts that are none."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{_text(one)}" for name, one in value) + "}"
    return str(value) if isinstance(value, Raw) else _encode(value)


_encode = json.JSONEncoder(default=str).encode


def _damaged(draw: Random, text: bytes) -> bytes:
    """Return a text with a few bytes changed, without regard to what they mean."""
    raw = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(raw) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            raw[at : at + 1] = bytes([draw.choice(STRUCTURE)])
        elif kind == 1:
            raw[at:at] = bytes([draw.randrange(256)])
        elif kind == 2:
            del raw[at : at + draw.choice((1, 2, 20))]
        elif kind == 3:
            raw[at:at] = raw[at : at + draw.choice((1, 8, 60))]
        else:
            raw += draw.choice(PADDINGS)
    return bytes(raw)
