"""What can be done to a tiny checkpoint, and the form of a corpus of such damages.

A damage changes a folder; it is made first and done later.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"
Damage = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """One checkpoint that must be refused.

    Attributes:
        name: What is wrong with it.
        damage: Does it to a copy of the good one.
        sentence: Regular expression for what is said about it.
        code: Exit code.
        method: With which method the damage is met; all but magnitude read text.
        sharded: Whether the good one has many shards and an index.
    """

    name: str
    damage: Damage
    sentence: str
    code: int = 3
    method: str = "magnitude"
    sharded: bool = False


def case(name: str, damage: Damage, sentence: str, **more: Any) -> Malformed:
    return Malformed(name=name, damage=damage, sentence=sentence, **more)


def write(name: str, content: bytes | str) -> Damage:
    """Another content for a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def sparse(name: str, size: int, beginning: bytes = b"") -> Damage:
    """A file of that size that takes no disk space."""

    def damage(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.write(beginning)
            file.truncate(size)

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else than a file under its name."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def link(name: str, target: str) -> Damage:
    return instead(name, lambda path: path.symlink_to(target))


def link_outside(name: str) -> Damage:
    """The file itself lies beside the model folder."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to("../elsewhere")

    return damage


def config(**changes: Any) -> Damage:
    """Other values in config.json."""
    return _json("config.json", changes)


def tokenizer(**changes: Any) -> Damage:
    """Other values in tokenizer.json."""
    return _json("tokenizer.json", changes)


def _json(name: str, changes: dict[str, Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def index(weight_map: object) -> Damage:
    return write(INDEX, json.dumps({"weight_map": weight_map}))


def file_of(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of the single file."""
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def header(text: bytes) -> Damage:
    """Another header before the same data."""
    return lambda folder: (folder / SINGLE).write_bytes(file_of(text, parts(folder)[1]))


def entry(name: str = QUERY, **changes: Any) -> Damage:
    """Other values in the header's description of a tensor."""

    def damage(folder: Path) -> None:
        described, data = parts(folder)
        described[name] = described.get(name, {}) | changes
        (folder / SINGLE).write_bytes(file_of(described, data))

    return damage


def moved(edit: Callable[[dict[str, Any], dict[str, bytes]], object]) -> Damage:
    """Other tensors, laid out anew as the format demands: descriptions and data by name."""

    def damage(folder: Path) -> None:
        described, data = parts(folder)
        described.pop("__metadata__")
        pieces = {name: data[slice(*one["data_offsets"])] for name, one in described.items()}
        edit(described, pieces)
        position = 0
        for name, one in described.items():
            one["data_offsets"] = [position, position + len(pieces[name])]
            position += len(pieces[name])
        ordered = b"".join(pieces[name] for name in described)
        (folder / SINGLE).write_bytes(file_of(described, ordered))

    return damage


def tensor(name: str, dtype: str, shape: list[int], data: bytes) -> Damage:
    """One tensor changed or added."""

    def edit(described: dict[str, Any], pieces: dict[str, bytes]) -> None:
        described[name] = {"dtype": dtype, "shape": shape}
        pieces[name] = data

    return moved(edit)


def without(*names: str) -> Damage:
    """Without the tensors whose names begin so."""

    def edit(described: dict[str, Any], pieces: dict[str, bytes]) -> None:
        for name in [one for one in described if one.startswith(names)]:
            del described[name], pieces[name]

    return moved(edit)


def number(name: str, value: float) -> Damage:
    """One weight changed, in float32."""

    def edit(described: dict[str, Any], pieces: dict[str, bytes]) -> None:
        pieces[name] = struct.pack("<f", value) + pieces[name][4:]

    return moved(edit)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]
