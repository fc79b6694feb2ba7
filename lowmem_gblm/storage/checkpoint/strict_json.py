"""Untrusted JSON: bounded in size, strictly UTF-8, every name once, every number a number.

Python's own reader takes NaN, turns 1e999 into infinity, lets the last of two equal names win,
guesses UTF-16, and makes half surrogate pairs that no file can hold. What two readers understand
differently is refused.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import CheckpointError, shown
from lowmem_gblm.storage.checkpoint.file_access import ordinary_file

MAX_JSON_BYTES = 32 << 20
# Empty lists take thirty times as much memory as text: a header of 300000 tensors has this many.
MAX_BRACKETS = 1_000_000
MAX_DIGITS = 4000


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in an ordinary file of a model folder, or raise `CheckpointError`."""
    size = ordinary_file(path.parent, path)
    if size > max_bytes:
        raise CheckpointError(
            f"{path} has {size} bytes, more than the {max_bytes} that are read of such a file"
        )
    with open(path, "rb") as file:
        return parse_json(path, file.read(max_bytes))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that is the content of `path`; raise `CheckpointError` if none is."""
    try:
        value = strict_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def strict_json(content: bytes) -> Any:
    """Return the value of a JSON text; raise `ValueError` with a message of one line."""
    brackets = content.count(b"{") + content.count(b"[")
    if brackets > MAX_BRACKETS:
        raise ValueError(f"it has {brackets} lists and objects, more than {MAX_BRACKETS}")
    text = content.decode("utf-8")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"a name occurs twice: {shown(twice)}")
    return names


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {shown(digits)}, which is too large")
    return value


def _constant(name: str) -> float:
    """Return infinity, which transformers writes into configurations; refuse NaN."""
    if name == "NaN":
        raise ValueError("it holds a NaN, which is no number")
    return float(name)
