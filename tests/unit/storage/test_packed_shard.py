"""Shards without their zeros: what the packed file holds, and that every byte comes back."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem_gblm.errors import CheckpointError
from lowmem_gblm.runtime.memory import host_peak_bytes
from lowmem_gblm.storage.checkpoint import packed_shard, reader
from lowmem_gblm.storage.checkpoint.packed_shard import pack_shard, unpacked_pieces
from support.damage import file_of

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def nothing() -> None:
    pass


def packed(shard: Path) -> packed_shard.PackedShard:
    return pack_shard(shard, shard.with_suffix(".packed"), nothing)


def unpacked(shard: Path) -> bytes:
    pieces = unpacked_pieces(shard.with_suffix(".packed"), shard.stat().st_size)
    return b"".join(map(bytes, pieces))


@st.composite
def data_of(draw: st.DrawFn, dtype: str, shape: list[int]) -> bytes:
    """Random bits, of which a random share is zero; with negative zeros and NaN among them."""
    size, numel = BYTES[dtype], math.prod(shape)
    source = np.random.default_rng(draw(st.integers(0, 2**32)))
    numbers = source.integers(0, 256, (numel, size), np.uint8)
    sign_alone = np.zeros(size, np.uint8)
    sign_alone[-1] = 0x80
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]))
    numbers[source.random(numel) < 0.2] = sign_alone
    numbers[source.random(numel) < 0.1] = 0xFF
    numbers[source.random(numel) < share] = 0
    return numbers.tobytes()


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """Files with tensors in another order in the header than in the data, blanks and metadata."""
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), unique=True))
    names = [name for name in names if name != "__metadata__"]
    described: dict[str, Any] = {}
    content = b""
    for name in names:
        dtype = draw(st.sampled_from(sorted(BYTES)))
        shape = draw(st.lists(st.integers(0, 12), max_size=3))
        data = draw(data_of(dtype, shape))
        offsets = [len(content), len(content) + len(data)]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += data
    header: dict[str, Any] = {name: described[name] for name in draw(st.permutations(names))}
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt", "ü": "\u2028"}
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), indent=draw(st.none() | st.just(1)))
    return file_of(text.encode() + b" " * draw(st.integers(0, 9)), content)


@settings(max_examples=40)
@given(content=shards(), piece_bytes=st.sampled_from([64, 128, 1 << 24]))
def test_every_byte_comes_back(content: bytes, piece_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in (reader, packed_shard):
            patch.setattr(module, "TENSOR_PIECE_BYTES", piece_bytes)
        shard = Path(folder, "shard")
        shard.write_bytes(content)
        made = packed(shard)
        assert made.original["bytes"] == len(content)
        assert unpacked(shard) == content


def save(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "shard", metadata={"format": "pt"})
    return folder / "shard"


def test_masks_and_values_are_what_is_said(tmp_path: Path) -> None:
    """Read by the library of the format: nothing of the package takes part."""
    weight = torch.randn(9, 7).masked_fill_(torch.rand(9, 7) < 0.5, 0).bfloat16()
    weight[0, :3] = torch.tensor([-0.0, torch.nan, torch.inf])
    norm = torch.ones(5, dtype=torch.float32)
    shard = save({"weight": weight, "norm": norm, "zero": torch.zeros(64)}, tmp_path)
    made = packed(shard)
    assert (made.tensors, made.masked) == (3, 2)
    with safe_open(shard.with_suffix(".packed"), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == {
        "header", "dense/norm", "mask/weight", "values/weight", "mask/zero", "values/zero",
    }  # fmt: skip
    assert torch.equal(found["dense/norm"], norm)
    bits = weight.flatten().view(torch.int16)
    positions = torch.arange(64)
    mask = (found["mask/weight"].to(torch.int64)[positions // 8] >> (positions % 8) & 1).bool()
    assert torch.equal(mask[:63], bits != 0)
    assert mask[0]
    assert not mask[63]
    assert torch.equal(found["values/weight"].view(torch.int16), bits[bits != 0])
    assert found["values/zero"].shape == (0,)


@pytest.mark.parametrize(
    ("kept", "dtype", "name"),
    [
        (59, torch.float16, "values/weight"),
        (60, torch.float16, "dense/weight"),
        (55, torch.float8_e4m3fn, "values/weight"),
        (56, torch.float8_e4m3fn, "dense/weight"),
    ],
)
def test_a_tensor_of_few_zeros_is_stored_as_it_is(
    kept: int, dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    """64 numbers have a mask of 8 bytes: four numbers of 2 bytes, eight of 1."""
    weight = (torch.arange(64) < kept).to(dtype)
    packed(save({"weight": weight}, tmp_path))
    with safe_open(tmp_path / "shard.packed", "pt") as file:
        assert name in set(file.keys())


def test_half_of_bfloat16_takes_nine_sixteenths(tmp_path: Path) -> None:
    weight = torch.ones(512, 512, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    made = packed(save({"weight": weight}, tmp_path))
    assert made.packed["bytes"] / made.original["bytes"] == pytest.approx(9 / 16, abs=0.001)


def test_memory_does_not_grow_with_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, whose peak begins at what is resident after a small shard."""

    def there_and_back(shard: Path) -> None:
        packed(shard)
        for _ in unpacked_pieces(shard.with_suffix(".packed"), shard.stat().st_size):
            pass

    size = 64 << 20
    weight = torch.zeros(size // 4)
    weight[::2] = 1.0
    shard = save({"weight": weight}, tmp_path)
    (tmp_path / "small").mkdir()
    small = save({"weight": weight[:1000].clone()}, tmp_path / "small")
    del weight
    for module in (reader, packed_shard):
        monkeypatch.setattr(module, "TENSOR_PIECE_BYTES", 1 << 20)
    child = os.fork()
    if child == 0:
        # Code is read from its file when it runs first, and is resident then.
        there_and_back(small)
        before = host_peak_bytes()
        there_and_back(shard)
        os._exit(host_peak_bytes() - before > size // 4)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("part", ["header", "mask/weight", "values/weight"])
def test_a_part_that_is_missing_is_named(part: str, tmp_path: Path) -> None:
    shard = save({"weight": torch.zeros(64)}, tmp_path)
    packed(shard)
    with safe_open(shard.with_suffix(".packed"), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del found[part]
    save_file(found, shard.with_suffix(".packed"))
    with pytest.raises(CheckpointError, match=f"packed is damaged: it lacks the part {part}"):
        unpacked(shard)


def test_a_shard_that_is_written_meanwhile_is_refused(tmp_path: Path) -> None:
    shard = save({"weight": torch.zeros(64)}, tmp_path)
    calls = []

    def overwrite() -> None:
        calls.append(1)
        if len(calls) == 3:
            with open(shard, "r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\1\0\0\0\0\0\0\0")

    with pytest.raises(CheckpointError, match="has other bytes now than when packing it began"):
        pack_shard(shard, shard.with_suffix(".packed"), overwrite)
