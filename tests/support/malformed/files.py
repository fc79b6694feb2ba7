"""Malformed checkpoints: what may be wrong within one safetensors file."""

from __future__ import annotations

import os
import pickle
from typing import Any

from support.damage import (
    QUERY,
    SINGLE,
    both,
    case,
    config,
    entry,
    file_of,
    header,
    moved,
    number,
    sparse,
    tensor,
    without,
    write,
)  # fmt: skip

FILE = r"MODEL/model\.safetensors"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
DEEP = 100_000
NOT_WHOLE = rf"{FILE} is no complete safetensors file: \d+ bytes, of which the header declares"
INVALID = rf"the header of {FILE} is not valid:"
NO_SHAPE = rf"tensor {QUERY} in {FILE} has no valid shape and data_offsets"
UNKNOWN = rf"tensor {QUERY} in {FILE} has the unknown dtype"
EXPECTED = r", expected one of F64, F32, .*BOOL"


def no_feed_forward(described: dict[str, Any], pieces: dict[str, bytes]) -> None:
    """Its matrices have no numbers."""
    for name in [one for one in described if ".mlp." in one]:
        described[name]["shape"] = [length % 144 for length in described[name]["shape"]]
        pieces[name] = b""


HEADERS = [
    case("an empty file", write(SINGLE, b""), f"{NOT_WHOLE} 0"),
    case("seven bytes", write(SINGLE, bytes(7)), f"{NOT_WHOLE} 0"),
    case("zeros", write(SINGLE, bytes(100)), f"{NOT_WHOLE} 0"),
    case("a header of one byte", write(SINGLE, b"\x01" + bytes(99)), f"{NOT_WHOLE} 1"),
    case("a header beyond the file", write(SINGLE, b"\x65" + bytes(99)), f"{NOT_WHOLE} 101"),
    case("a header beyond any file", write(SINGLE, b"\xff" * 99), rf"{NOT_WHOLE} {2**64 - 1}"),
    case(
        "a pickle by name of safetensors",
        write(SINGLE, pickle.dumps([1] * 99)),
        rf"{NOT_WHOLE} \d+",
    ),
    case(
        "a header of 100 MB",
        sparse(SINGLE, 10**8 + 8, (10**8).to_bytes(8, "little") + b"{"),
        rf"{FILE} has a header of 100000000 bytes, more than the \d+ that are read",
    ),
    case("no JSON", header(b"{not json}"), rf"{INVALID} Expecting property name .*"),
    case("a list", header(b"[1, 2]"), rf"the header of {FILE} is not a JSON object"),
    case("no UTF-8", header(b'{"\xff": 1}'), rf"{INVALID} 'utf-8' codec can't decode .*"),
    case("UTF-16", header('{"x": 1}'.encode("utf-16")), rf"{INVALID} 'utf-8' codec can't .*"),
    case("a byte order mark", header(b"\xef\xbb\xbf{}"), rf"{INVALID} Unexpected UTF-8 BOM .*"),
    case(
        "half a surrogate pair", header(b'{"\\ud800": 1}'), rf"{INVALID} it holds half of a surr.*"
    ),
    case("half a pair in UTF-8", header(b'{"\xed\xa0\x80": 1}'), rf"{INVALID} 'utf-8' codec .*"),
    case("deep lists", header(b"[" * DEEP), rf"{INVALID} it is nested too deeply"),
    case("deep objects", header(b'{"a":' * DEEP), rf"{INVALID} it is nested too deeply"),
    case(
        "a million lists",
        header(b'{"x":[' + b"[]," * 1_100_000 + b"0]}"),
        rf"{INVALID} it has 1100002 lists and objects, more than 1000000",
    ),
    case(
        "1e999", header(b'{"x": 1e999}'), rf"{INVALID} it holds the number 1e999, which is too l.*"
    ),
    case("5000 digits", header(b'{"x":' + b"9" * 5000 + b"}"), rf"{INVALID} it .* of 5000 digits"),
    case("a NaN", header(b'{"x": NaN}'), rf"{INVALID} it holds a NaN, which is no number"),
    case("a tensor twice", header(b'{"x":{},"x":{}}'), rf"{INVALID} a name occurs twice: x"),
    case(
        "a shape twice",
        header(b'{"x":{"shape":[1],"shape":[2]}}'),
        rf"{INVALID} a name occurs twice: shape",
    ),
    case(
        "metadata that is a list",
        header(b'{"__metadata__":["pt"]}'),
        rf"the header of {FILE} has a __metadata__ that does not map names to texts",
    ),
    case(
        "metadata of numbers",
        header(b'{"__metadata__":{"format":1}}'),
        rf"the header of {FILE} has a __metadata__ that does not map names to texts",
    ),
]

ENTRIES = [
    case("a tensor that is null", header(b'{"x":null}'), f"tensor x in {FILE} has no description"),
    case("a tensor that is a list", header(b'{"x":[]}'), f"tensor x in {FILE} has no description"),
    case("a dtype of the future", entry(dtype="F4"), f"{UNKNOWN} 'F4'{EXPECTED}"),
    case("no dtype", entry(dtype=None), f"{UNKNOWN} None{EXPECTED}"),
    case("a dtype that is a list", entry(dtype=["F32"]), rf"{UNKNOWN} \['F32'\]{EXPECTED}"),
    case(
        "a dtype that clears the screen",
        entry(dtype="\x1b[2J\n"),
        rf"{UNKNOWN} '\\x1b.*'{EXPECTED}",
    ),
    case("a dtype of a megabyte", entry(dtype="F" * 10**6), f"{UNKNOWN} 'F+…F+' .*{EXPECTED}"),
    case("a negative shape", entry(shape=[-48, -48]), NO_SHAPE),
    case("a shape of truths", entry(shape=[True, 2304]), NO_SHAPE),
    case("a shape of fractions", entry(shape=[48.0, 48.0]), NO_SHAPE),
    case("a shape of 3000 digits", entry(shape=[10**3000, 1]), NO_SHAPE),
    case("a shape of 100000 axes", entry(shape=[2**61] * DEEP), NO_SHAPE),
    case("a shape that is an object", entry(shape={"0": 48}), NO_SHAPE),
    case(
        "a shape beyond all memory",
        entry(shape=[2**62, 2**62]),
        rf"tensor {QUERY} in {FILE} has a shape of more than 2\*\*62 numbers",
    ),
    case("no offsets", entry(data_offsets=None), NO_SHAPE),
    case("three offsets", entry(data_offsets=[0, 1, 2]), NO_SHAPE),
    case("negative offsets", entry(data_offsets=[-9216, 0]), NO_SHAPE),
    case(
        "offsets the wrong way round",
        entry(data_offsets=[9216, 0]),
        rf"tensor {QUERY} in {FILE}: shape \[48, 48\] in F32 takes 9216 bytes, its data_offsets "
        rf"span -9216",
    ),
    case(
        "offsets beyond the file",
        entry(data_offsets=[2**40, 2**40 + 9216]),
        rf"tensor {QUERY} in {FILE} ends at byte \d+, the file at \d+: it is truncated",
    ),
    case(
        "a shape larger than its data",
        entry(shape=[48, 49]),
        rf"tensor {QUERY} in {FILE}: shape \[48, 49\] in F32 takes 9408 bytes, its .* span 9216",
    ),
    case(
        "a dtype larger than its data",
        entry(dtype="F64"),
        rf"tensor {QUERY} in {FILE}: shape \[48, 48\] in F64 takes 18432 bytes, its .* span 9216",
    ),
    case(
        "two tensors of the same bytes",
        entry(data_offsets=[0, 9216]),
        rf"tensor \S+ in {FILE} begins at byte \d+, expected \d+",
    ),
    case(
        "nothing in the middle of a tensor",
        entry("x", dtype="F32", shape=[0], data_offsets=[4, 4]),
        rf"tensor \S+ in {FILE} begins at byte \d+, expected \d+",
    ),
    case(
        "a byte too many",
        lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"x"),
        rf"{FILE} has \d+ bytes, its header accounts for \d+",
    ),
    case(
        "a byte too few",
        lambda folder: os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1),
        rf"tensor \S+ in {FILE} ends at byte \d+, the file at \d+: it is truncated",
    ),
    case(
        "a name that forges a second message",
        entry("x\r\n\x1b[31mlowmem-gblm: all is well\u202e", dtype="F32"),
        rf"tensor x\\r\\n\\x1b\[31mlowmem-gblm: all is well\\u202e in {FILE} has no valid shape .*",
    ),
    case(
        "a name of a megabyte",
        entry("x" * 10**6, dtype="F32"),
        rf"tensor x+…x+ \(1000000 characters\) in {FILE} has no valid shape and data_offsets",
    ),
]

TENSORS = [
    case(
        "no tensors", write(SINGLE, file_of({}, b"")), r"MODEL/config\.json says there are 3 .*: 0"
    ),
    case(
        "no matrix of a block", without(QUERY), rf"MODEL lacks the tensor for {QUERY} \(1 such .*"
    ),
    case("no norm", without(NORM), rf"MODEL lacks the tensor for {NORM} \(1 such tensors\)"),
    case(
        "no embedding", without(EMBEDDING), rf"MODEL lacks the tensor for {EMBEDDING} \(1 such .*"
    ),
    case("no second block", without("model.layers.1."), "MODEL has no tensor of decoder block 1"),
    case(
        "a matrix of another shape",
        tensor(QUERY, "F32", [24, 48], bytes(4608)),
        rf"tensor {QUERY} in {FILE} has the shape \[24, 48\], the architecture expects \[48, 48\]",
    ),
    case(
        "an embedding of another shape",
        tensor(EMBEDDING, "F32", [8, 48], bytes(1536)),
        rf"tensor {EMBEDDING} in {FILE} has the shape \[8, 48\], the arch.* expects \[320, 48\]",
    ),
    case(
        "a norm of one number",
        tensor(NORM, "F32", [], bytes(4)),
        rf"tensor {NORM} in {FILE} has the shape \[\], the architecture expects \[48\]",
    ),
    case(
        "a matrix of no rows",
        tensor(QUERY, "F32", [0, 48], b""),
        rf"tensor {QUERY} in {FILE} has the shape \[0, 48\], the architecture expects \[48, 48\]",
    ),
    case(
        "matrices of no numbers",
        both(config(intermediate_size=0), moved(no_feed_forward)),
        rf"tensor model\S+\.mlp\.down_proj\.weight in {FILE} holds no numbers: .* is \[48, 0\]",
    ),
    case(
        "a matrix of integers",
        tensor(QUERY, "I8", [48, 48], bytes(2304)),
        rf"tensor {QUERY} in {FILE} holds torch\.int8, expected floating-point numbers: if .*",
    ),
    case(
        "a norm of truths",
        tensor(NORM, "BOOL", [48], bytes(48)),
        rf"tensor {NORM} in {FILE} holds torch\.bool, expected floating-point numbers: .*",
    ),
    case(
        "a NaN",
        number(QUERY, float("nan")),
        rf"{QUERY} holds NaN or infinite weights in \S+: \[nan, nan\]. What is done is kept .*",
        code=6,
    ),
    case(
        "an infinity",
        number(QUERY, float("-inf")),
        rf"{QUERY} holds NaN or infinite weights in \S+: \[-inf, .*\]. What is done is kept .*",
        code=6,
    ),
    case(
        "a NaN outside of the blocks",
        number(NORM, float("nan")),
        rf"{NORM} holds NaN or infinite weights in \S+: \[nan, nan\]",
        code=6,
        method="gradient",
    ),
]
