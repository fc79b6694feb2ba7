"""A shard that grows part by part is the file that is written at once."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.checkpoint.header import TensorEntry
from lowmem_gblm.storage.checkpoint.shard import PendingShard, publish_shard, tensor_data
from lowmem_gblm.storage.locking import size_on_disk

SHAPES = {0: [(3, 5), (2,)], 1: [(1 << 19,)], 4: [(7, 1)]}
TENSORS = {
    f"{part}.{number}": torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + part
    for part, shapes in SHAPES.items()
    for number, shape in enumerate(shapes)
}
ORDERS = [*itertools.permutations(SHAPES)]


def parts(path: Path) -> dict[int, list[TensorEntry]]:
    return {
        part: [
            TensorEntry(
                name=name,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                file=path,
                offset=0,
                nbytes=tensor.nbytes,
            )
            for name, tensor in TENSORS.items()
            if name.startswith(f"{part}.")
        ]
        for part in SHAPES
    }


def write(shard: PendingShard, path: Path, part: int) -> None:
    entries = parts(path)[part]
    shard.write(part, tensor_data(entries, (TENSORS[one.name] for one in entries)))


def summary(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def at_once(tmp_path: Path) -> bytes:
    path = tmp_path / "at-once.safetensors"
    entries = [one for part in parts(path).values() for one in part]
    publish_shard(path, entries, tensor_data(entries, TENSORS.values()), "")
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    return path.read_bytes()


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("killed_after", [0, 1, 2, 3])
def test_any_order_and_any_interruption_give_the_file_and_its_hash(
    order: tuple[int, ...], killed_after: int, at_once: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "shard.safetensors"
    first = PendingShard(path, parts(path), order)
    for part in order[:killed_after]:
        assert not path.exists()
        write(first, path, part)
    noted = first.written
    second = PendingShard(path, parts(path), order)
    if killed_after:
        second.take_over(noted)
    for part in order[killed_after:]:
        assert not path.exists()
        write(second, path, part)
    assert path.read_bytes() == at_once
    assert second.written == summary(path)
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "at-once.safetensors",
        "shard.safetensors",
    ]


def test_what_was_cut_short_after_the_last_note_is_written_again(
    at_once: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "shard.safetensors"
    first = PendingShard(path, parts(path), [1, 0, 4])
    write(first, path, 1)
    noted = first.written
    write(first, path, 0)
    write(first, path, 4)
    # Complete, and has its name: the journal does not know.
    second = PendingShard(path, parts(path), [1, 0, 4])
    second.take_over(noted)
    for part in (0, 4):
        write(second, path, part)
    assert (path.read_bytes(), second.written) == (at_once, summary(path))


@pytest.mark.parametrize("where", [0, 40, -10])
def test_what_has_changed_since_it_was_written_is_told(where: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    first = PendingShard(path, parts(path), [4, 0, 1])
    write(first, path, 4)
    content = bytearray(first.file.read_bytes())
    content[where] ^= 1
    first.file.write_bytes(content)
    second = PendingShard(path, parts(path), [4, 0, 1])
    with pytest.raises(JobError, match="does not hold what an interrupted run has written: look"):
        second.take_over(first.written)


def test_space_that_no_part_fills_yet_is_not_counted_as_used(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    shard = PendingShard(path, parts(path), [4, 1, 0])
    write(shard, path, 4)
    assert shard.file.stat().st_size == shard.nbytes > 1 << 21
    assert size_on_disk(tmp_path) < 1 << 18
    write(shard, path, 1)
    write(shard, path, 0)
    assert size_on_disk(tmp_path) == shard.nbytes
