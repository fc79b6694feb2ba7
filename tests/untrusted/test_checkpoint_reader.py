"""Reading safetensors: what a good file gives, and how every bad one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowmem_gblm.errors import CheckpointError
from lowmem_gblm.storage.checkpoint.header import DTYPES, read_header
from lowmem_gblm.storage.checkpoint.reader import INDEX, SINGLE, Checkpoint
from lowmem_gblm.storage.checkpoint.strict_json import read_json

SHAPES = [(), (0,), (1,), (7,), (3, 5), (4, 0), (2, 3, 4), (1, 1, 1, 2)]
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
check = settings(deadline=None, max_examples=150, database=None)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits at all; booleans are 0 or 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(count)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def file_of(header: object, data: bytes = bytes(24)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def save(folder: Path, content: bytes) -> Path:
    (folder / SINGLE).write_bytes(content)
    return folder


def save_shards(folder: Path, weight_map: object, **shards: list[str]) -> Path:
    """Shards `a=["x"]` as a.safetensors with a tensor x, and an index."""
    for name, tensors in shards.items():
        save_file({one: torch.ones(2) for one in tensors}, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and raw[0].equal(raw[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_and_shape_is_read_as_safetensors_does(dtype, tmp_path):
    tensors = {f"t{shape}": random_tensor(dtype, shape) for shape in SHAPES}
    save_file(tensors, tmp_path / SINGLE)
    expected, checkpoint = load_file(tmp_path / SINGLE), Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(checkpoint.read(name), tensor)


def test_a_tensor_read_is_memory_of_its_own(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("x").fill_(7)
    assert checkpoint.read("x").tolist() == [1, 1, 1]


def test_bytes_are_counted(tmp_path):
    save_file({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.int8)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("x")
    assert (checkpoint.nbytes(), checkpoint.nbytes(["y"]), checkpoint.bytes_read) == (14, 2, 12)


def test_shards_are_read_through_their_index(tmp_path):
    save_shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=["x"], b=["y"])
    checkpoint = Checkpoint(tmp_path)
    assert {name: entry.file.name for name, entry in checkpoint.tensors.items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }


def test_metadata_is_no_tensor(tmp_path):
    save(tmp_path, file_of({"__metadata__": {"format": "pt"}, "x": ENTRY}))
    assert list(Checkpoint(tmp_path).tensors) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no complete safetensors file: 0 bytes"),
        (bytes(7), "is no complete safetensors file: 7 bytes"),
        (bytes(40), "40 bytes, of which the header declares 0"),
        ((10**9).to_bytes(8, "little") + b"{}", "of which the header declares 1000000000"),
        (b"\xff" * 20, "20 bytes, of which the header declares 18446744073709551615"),
        (file_of({"x": ENTRY})[:60], "is no complete safetensors file: 60 bytes"),
        (file_of(b"{not json}"), "is not valid"),
        (file_of(b'{"x": "\xff"}'), "is not valid"),
        (file_of(b"[" * 100_000), "is not valid"),
        (file_of(b'{"x": {"dtype": "F32"}, "x": {"dtype": "F32"}}'), "a name occurs twice"),
        (file_of([1, 2]), "is not a JSON object"),
        (file_of(b"null"), "is not a JSON object"),
    ],
)
def test_a_file_whose_header_cannot_be_read_is_refused(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(save(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F4"}, "tensor x in .* has the unknown dtype 'F4'"),
        ({"dtype": None}, "tensor x in .* has the unknown dtype None"),
        ({"dtype": ["F32"]}, "tensor x in .* has the unknown dtype"),
        ({"shape": [True, 6]}, "has no valid shape and data_offsets"),
        ({"shape": [-2, -3]}, "has no valid shape and data_offsets"),
        ({"shape": [2.0, 3.0]}, "has no valid shape and data_offsets"),
        ({"shape": "23"}, "has no valid shape and data_offsets"),
        ({"shape": None}, "has no valid shape and data_offsets"),
        ({"data_offsets": None}, "has no valid shape and data_offsets"),
        ({"data_offsets": [0]}, "has no valid shape and data_offsets"),
        ({"data_offsets": [0, 12, 24]}, "has no valid shape and data_offsets"),
        ({"data_offsets": [-24, 0]}, "has no valid shape and data_offsets"),
        ({"data_offsets": [False, 24]}, "has no valid shape and data_offsets"),
        ({"shape": [2, 4]}, r"shape \[2, 4\] in F32 takes 32 bytes, its data_offsets span 24"),
        ({"dtype": "F64"}, r"shape \[2, 3\] in F64 takes 48 bytes, its data_offsets span 24"),
        ({"data_offsets": [24, 0]}, "takes 24 bytes, its data_offsets span -24"),
        ({"shape": [2**62, 8]}, "tensor x in"),
        ({"shape": [2**60] * 300}, "tensor x in"),
        ({"shape": [10**3000, 10**3000]}, "tensor x in"),
        ({"shape": [0, 2**63], "data_offsets": [0, 0]}, "tensor x in"),
        ({"shape": [4, 3], "data_offsets": [0, 48]}, "ends at byte .*, the file at .* truncated"),
        ({"data_offsets": [8, 32]}, "ends at byte .*, the file at .* truncated"),
        ({"shape": [1, 3], "data_offsets": [12, 24]}, "tensor x in .* begins at byte .*, expected"),
        ({"shape": [1, 3], "data_offsets": [0, 12]}, "bytes, its header accounts for"),
    ],
)
def test_a_tensor_that_cannot_be_what_its_header_says_is_refused(change, message, tmp_path):
    data = b"" if change.get("data_offsets") == [0, 0] else bytes(24)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(save(tmp_path, file_of({"x": ENTRY | change}, data)))


@pytest.mark.parametrize("description", [None, 3, "F32", [2, 3]])
def test_a_tensor_without_a_description_is_refused(description, tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor x in .* has no description"):
        Checkpoint(save(tmp_path, file_of({"x": description})))


@pytest.mark.parametrize("second", [[0, 24], [12, 36], [28, 52]])
def test_overlapping_tensors_and_gaps_are_refused(second, tmp_path):
    header = {"x": ENTRY, "y": ENTRY | {"data_offsets": second}}
    with pytest.raises(CheckpointError, match=r"tensor y in .* begins at byte .*, expected"):
        Checkpoint(save(tmp_path, file_of(header, bytes(second[1]))))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        (["a.safetensors"], "has no weight_map"),
        ({"x": "b.safetensors"}, "names the shard b.safetensors, which is missing"),
        ({"x": ""}, "names the shard , which is missing"),
        ({"x": ".."}, r"names the shard \.\., which is missing"),
        ({"x": "a\0b"}, "which is missing"),
        ({"x": "a" * 5000}, "which is missing|not a file of the folder"),
        ({"x": "../a.safetensors"}, r"'\.\./a\.safetensors', which is not a file of the folder"),
        ({"x": "/etc/passwd"}, "places tensor x in '/etc/passwd', which is not a file"),
        ({"x": "sub\\a.safetensors"}, "which is not a file of the folder"),
        ({"x": 3}, "places tensor x in 3, which is not a file of the folder"),
        (
            {"x": "a.safetensors", "y": "a.safetensors"},
            r"the index promises y in a\.safetensors, whose header does not have it \(1 such",
        ),
    ],
)
def test_an_index_that_does_not_fit_is_refused(weight_map, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(save_shards(tmp_path, weight_map, a=["x"]))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=["x"], b=["x", "y"])
    with pytest.raises(CheckpointError, match=r"tensor x is in two files: a\.safe\w+ and b\.safe"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_with_a_way_out(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=rf"pickles \({name}\).*save_pretrained\(FOLDER\)"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    message = "has neither model.safetensors nor model.safetensors.index.json"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"there is no model folder .*{name}"):
        Checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
    ],
)
def test_json_that_is_no_object_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json {message}"):
        read_json(tmp_path / "config.json")


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-44])
    with pytest.raises(CheckpointError, match="ends inside tensor x: 356 of 400 bytes"):
        checkpoint.read("x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
almost_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(DTYPES)) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.just(2**62), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 30), max_size=3) | json_values,
    },
)
headers = st.dictionaries(st.text(max_size=5), almost_entries | json_values, max_size=3)


def read_or_refuse(content: bytes, folder: Path) -> None:
    """Reads every tensor of a file with this content; only a CheckpointError may stop it."""
    folder.mkdir(exist_ok=True)
    try:
        checkpoint = Checkpoint(save(folder, content))
        for name, entry in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == entry.shape
    except CheckpointError:
        return
    finally:
        shutil.rmtree(folder)


@check
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else_happens(tmp_path_factory, content):
    read_or_refuse(content, tmp_path_factory.getbasetemp() / "random")


@check
@given(headers, st.binary(max_size=30))
@example({"x": ENTRY}, bytes(24))
def test_random_headers_are_read_or_refused(tmp_path_factory, header, data):
    read_or_refuse(file_of(header, data), tmp_path_factory.getbasetemp() / "headers")


@check
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(tmp_path_factory, place, value):
    content = bytearray(file_of({"x": ENTRY, "y": ENTRY | {"data_offsets": [24, 48]}}, bytes(48)))
    content[place % len(content)] = value
    read_or_refuse(bytes(content), tmp_path_factory.getbasetemp() / "changed")


@check
@given(st.integers(0, 200))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, length):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    whole = file_of({"x": ENTRY})
    path.write_bytes(whole[: length % len(whole)])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_header(path)
