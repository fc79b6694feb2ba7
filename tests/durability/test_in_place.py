"""Pruning in place: the same tensors as with an output, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import DiskError, DiskFull, JobError, NonFiniteError
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.storage import in_place
from lowmem_gblm.storage.in_place_marker import MARKER_FILE
from lowmem_gblm.storage.job import Job
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from support.crashes import KILL_MATRIX, Killer, Photographer, Stop, content, stopped_at
from support.tiny_models import save_tiny

SIZE = {"nsamples": 2, "seqlen": 16}
KILLS = 10
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(prune_in_place: Run) -> Run:
    return prune_in_place


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A copy of it, to be pruned."""
    return Path(shutil.copytree(small, tmp_path / "model"))


@pytest.fixture
def dense_blocks(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever block is loaded, in any sweep, must be the dense one."""
    dense, load = load_file(small / "model.safetensors"), StreamedModel.load_block

    def watching(streamed: StreamedModel, index: int, tensors: dict, **options: Any) -> None:
        for name, tensor in tensors.items():
            assert torch.equal(tensor, dense[name]), name
        load(streamed, index, tensors, **options)

    monkeypatch.setattr(StreamedModel, "load_block", watching)


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {
        name: tensor.view(-1).view(torch.uint8).numpy().tobytes()
        for shard in shards
        for name, tensor in shard.items()
    }


def headers(folder: Path) -> dict[str, bytes]:
    """The header of every shard, and how long the shard is."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        found[path.name] = data[:length] + str(len(data)).encode()
    return found


def side_files(folder: Path) -> dict[str, str]:
    """Every file but weights and the card."""
    left_out = ("safetensors", "README.md")
    return {
        name: found
        for name, found in content(folder).items()
        if not any(part in name for part in left_out)
    }


@pytest.mark.parametrize(
    ("architecture", "form", "options"),
    [
        ("llama", {}, {"method": "gblm"}),
        ("llama", {"sharded": True}, {"method": "gblm"}),
        ("llama", {"sharded": True}, {"method": "gblm", "activations": "dense"}),
        ("llama", {"tied": True}, {"method": "gblm", "activations": "dense"}),
        ("llama", {"dtype": torch.bfloat16}, {"method": "gradient", "pattern": "2:4"}),
        ("llama", {}, {"method": "wanda", "include": ("*.layers.1.*",)}),
        ("llama", {"sharded": True}, {"method": "sparsegpt", "activations": "dense"}),
        ("gpt2", {}, {"method": "gblm"}),
        ("gpt2", {"sharded": True}, {"method": "magnitude"}),
        ("mixtral", {}, {"method": "gblm", "activations": "dense"}),
        ("mixtral", {"sharded": True}, {"method": "gblm"}),
        ("mixtral", {}, {"method": "wanda"}),
    ],
)
def test_the_tensors_are_those_of_an_ordinary_run(
    architecture: str, form: dict, options: dict, run: Run, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(architecture, tmp_path / "model", width=32, **form)
    dense = Path(shutil.copytree(model, tmp_path / "dense"))
    ordinary = lowmem_gblm.prune(
        model, tmp_path / "out", calibration=str(text_file), **SIZE, **options
    )
    record = run(model, **options)
    assert tensor_bytes(model) == tensor_bytes(tmp_path / "out")
    assert headers(model) == headers(dense)
    assert side_files(model) == side_files(dense)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "dense", "out"}
    for name in ("tensors", "sparsity_measured", "calibration_loss"):
        assert record[name] == ordinary[name], name
    for name in ("source_headers", "calibration_tokens"):
        assert record["fingerprints"][name] == ordinary["fingerprints"][name], name
    assert {name: one["sha256"] for name, one in record["shards"].items()} == {
        name: found for name, found in content(model).items() if name.endswith(".safetensors")
    }
    assert lowmem_gblm.verify(model, dense)["pruned_tensors"] == len(record["tensors"])


def test_tensors_that_stay_dense_are_never_written(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: set[str] = set()
    copy = in_place._copy

    def watching(source, entry, target, place) -> None:
        written.add(place.name)
        copy(source, entry, target, place)

    monkeypatch.setattr(in_place, "_copy", watching)
    assert run(model, include=("*.mlp.*",))["tensors"].keys() == written


@pytest.mark.parametrize("activations", ["pruned", "dense"])
def test_with_little_disk_boundaries_are_computed_again_and_the_result_is_the_same(
    activations: str, run: Run, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", blocks=4, width=16)
    asked = {"calibration": str(text_file), "nsamples": 4, "seqlen": 128}
    asked["activations"] = activations
    lowmem_gblm.prune(model, tmp_path / "out", **asked)
    ample = lowmem_gblm.plan(model, in_place=True, **asked)
    assert ample["choices"]["boundary_interval"] == 1
    record = run(model, disk=ample["predicted"]["disk_bytes"] - 4 * 128 * 16 * 4, **asked)
    assert record["choices"]["boundary_interval"] > 1
    assert tensor_bytes(model) == tensor_bytes(tmp_path / "out")


class Torn:
    """Writes to a shard in two halves, with a photograph before, between and after them."""

    def __init__(self, photographer: Photographer, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = photographer.photographed(in_place.write_at)
        monkeypatch.setattr(in_place, "write_at", self)

    def __call__(self, target: int, data: memoryview, offset: int) -> None:
        half = len(data) // 2
        self._write(target, data[:half], offset)
        self._write(target, data[half:], offset + half)


@pytest.mark.parametrize(("method", "activations", "every"), KILL_MATRIX)
@pytest.mark.usefixtures("dense_blocks")
def test_killed_before_in_or_after_any_durable_operation(
    method: str, activations: str, every: int, run: Run, small: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = {"method": method, "activations": activations, "include": ("*.mlp.*",)}
    scene = tmp_path / "scene"
    model = Path(shutil.copytree(small, scene / "model"))
    photographer = Photographer(scene, tmp_path / "album")
    with photographer.watching(monkeypatch), monkeypatch.context() as patch:
        Torn(photographer, patch)
        run(model, **options)
    expected = content(model)
    assert expected != content(small)
    assert photographer.operations > 30
    for photograph in photographer.photographs[::every]:
        shutil.rmtree(scene)
        photograph.rename(scene)
        if (model / "pruning.json").exists():
            with pytest.raises(JobError, match="was pruned already"):
                run(model, **options)
        else:
            run(model, **options)
        assert content(model) == expected, photograph
        assert [path.name for path in scene.iterdir()] == ["model"], photograph


def test_killed_at_random_times(run: Run, small: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small, tmp_path / "expected" / "model"))
    start = time.monotonic()
    run(model)
    seconds = time.monotonic() - start
    expected = content(model)
    killer = Killer(seconds)
    model = Path(shutil.copytree(small, tmp_path / "model"))
    while killer.kills < KILLS:
        killer.kills_one(lambda: run(model))
        if (model / "pruning.json").exists():
            with pytest.raises(JobError, match="was pruned already"):
                run(model)
            assert content(model) == expected
            shutil.rmtree(model)
            shutil.copytree(small, model)


def test_the_journal_comes_before_the_first_byte_and_the_file_goes_last(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "model", blocks=1, width=16)
    events: list[str] = []

    def told(owner: object, name: str, event: Callable[..., str | None]) -> None:
        operation = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            result = operation(*args, **options)
            happened = event(*args)
            if happened is not None and events[-1:] != [happened]:
                events.append(happened)
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def flushed(descriptor: int) -> str | None:
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        return "flush" if file.startswith(f"{model}/model") else None

    told(in_place, "publish_shard", lambda *args: "publish")
    told(Job, "add", lambda *args: "journal")
    told(in_place, "write_at", lambda *args: "overwrite")
    told(os, "fsync", flushed)
    told(Path, "unlink", lambda path, **_: "remove" if "overwrites" in path.name else None)
    run(model, method="magnitude")
    assert " ".join(events) == "journal publish journal overwrite flush remove"


def test_the_notice_says_what_has_become_of_the_model_and_how_to_go_on(
    run: Run, small: Path, model: Path
) -> None:
    stopped_at(run, model, "dense", 1)
    assert content(model).keys() - content(small).keys() == {MARKER_FILE}
    text = (model / MARKER_FILE).read_text()
    assert "Nothing has been overwritten yet" in text
    assert f"lowmem-gblm resume {model}.work\n" in text
    assert f"remove this file and {model}.work: the model is as it was" in text
    stopped_at(run, model, "prune", 1)
    text = (model / MARKER_FILE).read_text()
    assert "Some of its blocks are pruned and some\nare not" in text
    assert f"lowmem-gblm resume {model}.work\n" in text
    assert f"It needs {model}.work; without that, the model has to be fetched anew" in text


def test_giving_up_as_the_notice_says_leaves_the_model_as_it_was(
    run: Run, small: Path, model: Path
) -> None:
    stopped_at(run, model, "dense", 1)
    (model / MARKER_FILE).unlink()
    shutil.rmtree(f"{model}.work")
    assert content(model) == content(small)
    run(model)


@pytest.mark.parametrize("step", [1, 2])
def test_resume_goes_on_with_it(
    step: int, run: Run, small: Path, model: Path, tmp_path: Path, capsys
) -> None:
    run(Path(shutil.copytree(small, tmp_path / "expected" / "model")))
    stopped_at(run, model, "prune", step)
    assert main(["resume", f"{model}.work"]) == 0
    assert f"the checkpoint is {model}" in capsys.readouterr().out
    assert content(model) == content(tmp_path / "expected" / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "model"}


def test_every_name_of_the_folder_leads_to_the_same_job(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model)
    stopped_at(run, tmp_path / "link", "prune", 1)
    monkeypatch.chdir(model)
    assert run(Path("."))["attempts"] == 2


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "MODEL"],
        ["plan", "MODEL", "--in-place"],
        ["prune", "MODEL", "out"],
        ["prune", "MODEL", "--in-place", "--overwrite-my-only-copy", "--work-dir", "elsewhere"],
        ["eval", "MODEL", "--text", "TEXT"],
        ["verify", "MODEL"],
        ["verify", "SMALL", "--against", "MODEL"],
        ["compare", "MODEL", "--text", "TEXT"],
    ],
    ids=" ".join,
)
def test_a_model_that_is_half_pruned_is_refused_by_everything_else(
    command: list[str], run: Run, small: Path, model: Path, tmp_path: Path, text_file: Path,
    monkeypatch: pytest.MonkeyPatch, capsys,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stopped_at(run, model, "prune", 1)
    finished = Path(shutil.copytree(small, tmp_path / "small"))
    run(finished)
    before = content(tmp_path)
    words = {"MODEL": str(model), "TEXT": str(text_file), "SMALL": str(finished)}
    assert main([words.get(word, word) for word in command]) == 5
    sentence = (
        f"lowmem-gblm: {model} is being pruned in place, or was until that was interrupted: some "
        f"of its blocks may be pruned and others not. {model}/{MARKER_FILE} says how to resume "
        f"it\n"
    )
    assert capsys.readouterr().err.removeprefix("dense: measuring perplexity\n") == sentence
    assert content(tmp_path) == before
    run(model)


def test_a_stale_notice_beside_the_record_keeps_nobody_away(run: Run, model: Path) -> None:
    run(model)
    (model / MARKER_FILE).touch()
    assert lowmem_gblm.verify(model)


def test_another_job_on_the_same_model_is_refused(run: Run, model: Path) -> None:
    stopped_at(run, model, "prune", 1)
    with pytest.raises(JobError) as caught:
        run(model, sparsity=0.7)
    assert "begun otherwise (sparsity: 0.5, now 0.7)" in str(caught.value)
    assert f"{MARKER_FILE} in the model says whether it can still be given up" in str(caught.value)
    assert "remove" not in str(caught.value)
    run(model)


def test_a_model_of_the_same_name_is_not_taken_for_the_one_begun(
    run: Run, small: Path, model: Path, tmp_path: Path
) -> None:
    """Their work folders are one, their headers equal."""
    other = Path(shutil.copytree(small, tmp_path / "others" / "model"))
    stopped_at(run, model, "prune", 1, work_dir=tmp_path / "work")
    with pytest.raises(JobError, match=rf"work/model.work holds the job of {model}: give another"):
        run(other, work_dir=tmp_path / "work")
    assert content(other) == content(small)
    run(other)
    # A finished one must not clear the work folder of one that is not.
    with pytest.raises(JobError, match="was pruned already"):
        run(other, work_dir=tmp_path / "work")
    run(model, work_dir=tmp_path / "work")
    assert content(model) == content(other)


def test_an_ordinary_run_does_not_go_on_from_a_model_that_was_pruned_since(
    run: Run, model: Path, text_file: Path, tmp_path: Path
) -> None:
    def ordinary(output: Path, **options: Any) -> dict[str, Any]:
        return lowmem_gblm.prune(model, output, calibration=str(text_file), **SIZE, **options)

    stopped_at(ordinary, tmp_path / "out", "dense", 1)
    run(model)
    with pytest.raises(JobError, match="source_pruned: False, now True"):
        ordinary(tmp_path / "out")


def test_a_job_that_was_killed_when_all_was_done_is_cleared_away(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(model: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "remove_marker", killed)
        with pytest.raises(Stop):
            run(model)
    assert (model / MARKER_FILE).exists()
    assert lowmem_gblm.verify(model)
    with pytest.raises(JobError, match="was pruned already"):
        run(model)
    assert not (model / MARKER_FILE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_journal_has_must_be_there_as_it_was(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(in_place.InPlaceWriter, "_overwrite", lambda *args: None)
        stopped_at(run, model, "prune", 1)
    (path,) = Path(f"{model}.work").glob("overwrites-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(JobError) as caught:
        run(model)
    assert f"{path} is damaged: its checksum is not the one in the journal" in str(caught.value)
    assert f"weights in {model}, which cannot be finished without it" in str(caught.value)
    assert "look at the disk, and fetch the model anew" in str(caught.value)
    assert path.exists()


@pytest.mark.parametrize(
    ("place", "error", "kind", "sentence"),
    [
        (
            "model/model.safetensors",
            OSError(errno.EIO, "Input/output error"),
            DiskError,
            "the shard could not be written to or read from FILE: look after that disk, then give "
            "the same command again, or lowmem-gblm resume MODEL.work, which resumes from what is",
        ),
        (
            "model.work/overwrites-00001.safetensors",
            OSError(errno.ENOSPC, "No space left on device"),
            DiskFull,
            "the disk is full: the new weights of block 1 could not be written to FILE, ",
        ),
    ],
)
def test_a_disk_that_fails_is_told_and_gone_on_with(
    place: str, error: OSError, kind: type, sentence: str, run: Run, small: Path, model: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run(Path(shutil.copytree(small, tmp_path / "expected" / "model")))
    write, calls = os.pwrite, []

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path / place)):
            calls.append(descriptor)
            if len(calls) == 3:
                raise error
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(kind) as caught:
            run(model)
    words = sentence.replace("FILE", str(tmp_path / place)).replace("MODEL", str(model))
    assert words in str(caught.value)
    run(model)
    assert content(model) == content(tmp_path / "expected" / "model")


def test_what_cannot_be_mended_leaves_the_model_as_it_was_or_says_that_it_is_lost(
    run: Run, small: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = BlockPruner.prune

    def sick(pruner: BlockPruner, block: Any, *args: Any) -> None:
        if block.index == first_sick:
            raise NonFiniteError("sick")
        prune(pruner, block, *args)

    monkeypatch.setattr(BlockPruner, "prune", sick)
    first_sick = 0
    with pytest.raises(NonFiniteError) as caught:
        run(model)
    work = Path(f"{model}.work")
    assert str(caught.value) == (
        f"sick. What is done is kept in {work}: lowmem-gblm resume {work} resumes it; to discard "
        f"it, remove {work} and {model / MARKER_FILE}"
    )
    assert content(model) == content(small) | {MARKER_FILE: content(model)[MARKER_FILE]}
    first_sick = 1
    with pytest.raises(NonFiniteError) as caught:
        run(model)
    assert str(caught.value) == (
        f"sick. What is done is kept in {work}: lowmem-gblm resume {work} resumes it. {model} is "
        f"partly pruned by now: if this cannot be mended, the model has to be fetched anew"
    )
    assert (model / MARKER_FILE).exists()
    assert Path(f"{model}.work").exists()
