"""`pack` and `unpack`: every file of every kind of output comes back; what is refused, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import CheckpointError, JobError, RequestError
from support.tiny_models import save_tiny

MANIFEST = "packed.json"
OUTPUTS = [
    ("magnitude", {"sparsity": 0.7}, torch.float32),
    ("wanda", {"pattern": "2:4"}, torch.bfloat16),
    ("gblm", {"sparsity": 0.5}, torch.float16),
    ("gradient", {"pattern": "4:8"}, torch.bfloat16),
    ("sparsegpt", {"pattern": "2:4"}, torch.float32),
]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def output(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of prune, with a folder of its own in it. Not to be modified."""
    folder = tmp_path_factory.mktemp("output") / "out"
    lowmem_gblm.prune(small, folder, method="magnitude", max_shard_size=1)
    (folder / "notes").mkdir()
    (folder / "notes" / "read me.txt").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def packed(output: Path) -> Path:
    """The packed output. Not to be modified."""
    lowmem_gblm.pack(output, output.with_name("packed"))
    return output.with_name("packed")


@pytest.mark.parametrize(
    ("method", "goal", "dtype"), OUTPUTS, ids=[method for method, *_ in OUTPUTS]
)
def test_every_file_of_an_output_comes_back(
    method: str, goal: dict[str, Any], dtype: torch.dtype, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=dtype, blocks=2, width=16)
    asked = {"nsamples": 2, "seqlen": 16, "calibration": str(text_file), **goal}
    output, packed, again = (tmp_path / name for name in ("out", "packed", "again"))
    lowmem_gblm.prune(model, output, method=method, **asked)
    made = lowmem_gblm.pack(output, packed)
    assert made["masked_tensors"] == 14
    assert made["packed_bytes"] < made["bytes"]
    lowmem_gblm.unpack(packed, again)
    assert files(again) == files(output)
    lowmem_gblm.verify(again, model)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_dense_checkpoint_of_others_comes_back(sharded: bool, tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model", sharded=sharded, blocks=2, width=16)
    lowmem_gblm.pack(model, tmp_path / "packed")
    lowmem_gblm.unpack(tmp_path / "packed", tmp_path / "again")
    assert files(tmp_path / "again") == files(model)


def test_the_command_line_says_what_was_made(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, again = str(tmp_path / "packed"), str(tmp_path / "again")
    ticks: list[Any] = []
    assert main(["pack", str(output), packed]) == 0
    line = capsys.readouterr().out
    assert line.startswith("packed 14 of 21 tensors: ")
    assert line.endswith(f"; the packed checkpoint is {packed}\n")
    assert main(["unpack", packed, again, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "packed": packed,
        "output": again,
        "files": len(files(output)),
        "bytes": sum(map(len, files(output).values())),
    }
    lowmem_gblm.pack(again, tmp_path / "once more", listener=ticks.append)
    assert [(tick.stage, tick.step, tick.steps) for tick in ticks] == [
        ("pack", 1, 3), ("pack", 2, 3), ("pack", 3, 3),
    ]  # fmt: skip
    assert files(tmp_path / "once more") == files(Path(packed))
    assert main(["unpack", packed, again]) == JobError.exit_code
    assert f"{again} exists already: choose another OUTPUT" in capsys.readouterr().err
    assert main(["pack", again, packed]) == JobError.exit_code
    assert f"{packed} exists already: choose another PACKED" in capsys.readouterr().err


def test_no_loader_takes_it_for_a_model(packed: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        AutoModelForCausalLM.from_pretrained(packed)
    lowmem_gblm.pack(small, tmp_path / "single")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "single")
    with pytest.raises(CheckpointError, match=r"names the shard .*, which is missing"):
        lowmem_gblm.evaluate(packed, text="demo")


def test_a_damaged_file_is_refused_by_name(packed: Path, output: Path, tmp_path: Path) -> None:
    """Whatever bit is flipped, at the beginning, in the middle or at the end of any file."""
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    for name, content in files(packed).items():
        for at in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[at] ^= 4
            (folder / name).write_bytes(damaged)
            # A bit of the manifest can make the file that it speaks of seem damaged.
            path = folder if name == MANIFEST else folder / name
            with pytest.raises(CheckpointError) as refused:
                lowmem_gblm.unpack(folder, tmp_path / "again")
            assert str(path) in str(refused.value)
        for shorter in (content[:-1], b""):
            (folder / name).write_bytes(shorter)
            if shorter.strip() != content.strip():
                with pytest.raises(CheckpointError, match="packed"):
                    lowmem_gblm.unpack(folder, tmp_path / "again")
        (folder / name).write_bytes(content)
        assert {path.name for path in tmp_path.iterdir()} == {"packed"}
    lowmem_gblm.unpack(folder, tmp_path / "again")
    assert files(tmp_path / "again") == files(output)


def test_a_missing_file_is_named_and_others_do_not_disturb(
    packed: Path, output: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    (folder / "card.md").write_text("of somebody else")
    lowmem_gblm.unpack(folder, tmp_path / "again")
    assert files(tmp_path / "again") == files(output)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks config\.json: fetch it again"):
        lowmem_gblm.unpack(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, r"packed in another format \(2, expected 1\): unpack it with"),
        ({"files": {}}, "is damaged: it does not describe files"),
        ({"files": {"config.json": {"bytes": 1}}}, "is damaged: it does not describe files"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    change: dict[str, Any], sentence: str, packed: Path, tmp_path: Path
) -> None:
    manifest = json.loads((packed / MANIFEST).read_text())
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=sentence):
        lowmem_gblm.unpack(tmp_path / "packed", tmp_path / "again")


def test_names_of_a_manifest_lead_to_no_other_folder(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../outside.txt"] = manifest["files"]["config.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    shutil.copy(folder / "config.json", tmp_path / "outside.txt")
    with pytest.raises(CheckpointError, match=r"lacks \.\./outside\.txt"):
        lowmem_gblm.unpack(folder, tmp_path / "again")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")
    shutil.copy(packed / MANIFEST, folder / MANIFEST)
    with pytest.raises(CheckpointError, match=r"config\.json is a link to /etc/passwd, outside"):
        lowmem_gblm.unpack(folder, tmp_path / "again")


def test_what_cannot_be_packed_is_refused(
    packed: Path, output: Path, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="is packed already: give the folder"):
        lowmem_gblm.pack(packed, tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"has no packed\.json: give a folder that pack has"):
        lowmem_gblm.unpack(output, tmp_path / "again")
    (tmp_path / "text").mkdir()
    with pytest.raises(CheckpointError, match="holds no safetensors that could be packed"):
        lowmem_gblm.pack(tmp_path / "text", tmp_path / "again")
    damaged = tmp_path / "damaged"
    shutil.copytree(output, damaged)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"pruning\.json says otherwise: the checkpoint is"):
        lowmem_gblm.pack(damaged, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"text", "damaged"}
