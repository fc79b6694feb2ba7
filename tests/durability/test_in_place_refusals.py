"""Pruning in place: what is asked and planned, and what is refused before anything is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import BudgetError, JobError, NonFiniteError, RequestError, UnsupportedModel
from lowmem_gblm.storage import in_place
from lowmem_gblm.storage.in_place_marker import MARKER_FILE
from support.crashes import content
from support.tiny_models import save_tiny

SIZE = {"nsamples": 2, "seqlen": 16}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(prune_in_place: Run) -> Run:
    return prune_in_place


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A copy of it, to be pruned."""
    return Path(shutil.copytree(small, tmp_path / "model"))


def sizes(folder: Path) -> dict[str, int]:
    return {name: one.nbytes for name, one in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gblm"])
def test_weights_that_are_not_numbers_are_found_before_anything_is_overwritten(
    method: str, run: Run, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", blocks=2, width=16)
    name = "model.layers.1.mlp.down_proj.weight"
    path = model / "model.safetensors"
    entry = in_place.read_header(path)[name]
    with open(path, "r+b") as file:
        file.seek(entry.offset)
        file.write(torch.tensor([torch.nan]).numpy().tobytes())
    before = content(model)
    with pytest.raises(NonFiniteError, match=f"{name} holds NaN"):
        run(model, method=method)
    # Of a run that has finished no step, nothing stays.
    marker = content(model).keys() & {MARKER_FILE}
    assert bool(marker) == (method != "magnitude")
    assert content(model) == before | {name: content(model)[name] for name in marker}


class Einsum(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", input, self.weight)


@pytest.fixture
def strange_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of a llama multiplies with one matrix in a way of its own."""
    made = LlamaDecoderLayer.__init__

    def make(self: LlamaDecoderLayer, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        if layer_idx == config.num_hidden_layers - 1:
            ordinary = self.mlp.down_proj
            self.mlp.down_proj = Einsum(ordinary.in_features, ordinary.out_features, bias=False)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", make)


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gradient", "gblm"])
def test_a_block_that_is_not_followed_is_found_before_anything_is_overwritten(
    method: str, activations: str, strange_block: None, run: Run, model: Path, tmp_path: Path
) -> None:
    before, seen = content(model), set()
    with pytest.raises(UnsupportedModel, match=r"never multiplied activations with mlp\.down_proj"):
        run(
            model,
            method=method,
            activations=activations,
            listener=lambda tick: seen.add(tick.stage),
        )
    assert seen == {"embed", "dense" if method in ("gradient", "gblm") else "dry_run"}
    # The finished steps stay, and the marker says how to resume them or to give up.
    marker = content(model).pop(MARKER_FILE)
    assert content(model) == before | {MARKER_FILE: marker}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.work"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["MODEL", "--in-place"],
            "--in-place overwrites the weights in MODEL, block by block: the dense model is gone "
            "then, and a run that is interrupted leaves a folder that is good for nothing until "
            "the run has been resumed and finished. If that is what you want, type --in-place "
            "--overwrite-my-only-copy",
        ),
        (
            ["MODEL", "out", "--in-place", "--overwrite-my-only-copy"],
            "--in-place overwrites MODEL itself: give that, or the OUTPUT out, not both",
        ),
        (
            ["MODEL", "--in-place", "out"],
            "--in-place overwrites MODEL itself: give that, or the OUTPUT out, not both",
        ),
        (["MODEL"], "prune needs an OUTPUT folder, or --in-place to overwrite MODEL itself"),
        (["MODEL", "out", "--overwrite-my-only-copy"], "--overwrite-my-only-copy needs --in-place"),
        (["MODEL", "out", "--in-place-shared"], "--in-place-shared needs --in-place"),
        (
            ["demo", "--in-place", "--overwrite-my-only-copy"],
            "--in-place needs a model folder; the embedded model stays as it is",
        ),
        (
            ["some/model", "--in-place", "--overwrite-my-only-copy"],
            "--in-place overwrites a model folder, and some/model is none: download the model "
            "into a folder of yours (hf download MODEL --local-dir FOLDER), and give that",
        ),
    ],
)
def test_a_bad_request_is_refused_and_nothing_is_touched(
    options: list[str], sentence: str, small: Path, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["prune", *(str(model) if one == "MODEL" else one for one in options)]) == 2
    expected = sentence
    if options[0] == "MODEL" and not sentence.startswith("prune"):
        expected = sentence.replace("MODEL", str(model))
    assert capsys.readouterr().err == f"lowmem-gblm: {expected}\n"
    assert content(model) == content(small)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_may_stand_after_options(
    small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--method", "magnitude", "--calibration", str(text_file)]
    assert main(["prune", str(small), *asked, "out"]) == 0
    assert (tmp_path / "out" / "pruning.json").exists()
    capsys.readouterr()
    for surplus in (["one", "two"], ["--nonsense"]):
        assert main(["prune", str(small), *asked, *surplus]) == 2
        assert f"unrecognized arguments: {surplus[-1]}\n" in capsys.readouterr().err


def test_a_model_that_was_pruned_already_is_refused(run: Run, model: Path) -> None:
    run(model)
    before = content(model)
    with pytest.raises(JobError) as caught:
        run(model)
    assert str(caught.value) == (
        f"{model} was pruned already: it has a pruning.json. To prune once more what is there "
        f"now, move that file away"
    )
    assert content(model) == before
    (model / "pruning.json").unlink()
    run(model, sparsity=0.75)
    assert lowmem_gblm.verify(model)["sparsity_measured"] >= 0.75


def hard_linked(model: Path, elsewhere: Path) -> str:
    os.link(model / "model.safetensors", elsewhere)
    return "has 2 names (hard links)"


def symbolic_link(model: Path, elsewhere: Path) -> str:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors").symlink_to("weights.safetensors")
    return f"is a symbolic link to {model}/weights.safetensors"


@pytest.mark.parametrize("share", [hard_linked, symbolic_link])
def test_files_that_others_may_use_are_overwritten_only_if_that_is_said(
    share: Callable[[Path, Path], str], run: Run, small: Path, model: Path, tmp_path: Path
) -> None:
    why = share(model, tmp_path / "elsewhere")
    before = content(tmp_path)
    for command in (run, lambda model: lowmem_gblm.plan(model, in_place=True)):
        with pytest.raises(RequestError) as caught:
            command(model)
        assert str(caught.value) == (
            f"{model}/model.safetensors {why}: --in-place would prune it for whoever else uses "
            f"it, too. Give a copy of the model; or add --in-place-shared, if no one else needs it"
        )
    assert content(tmp_path) == before
    run(model, in_place_shared=True)
    run(Path(shutil.copytree(small, tmp_path / "copy")))
    name = "model.safetensors"
    assert (model / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


@pytest.mark.parametrize("links", [True, False])
def test_a_cache_of_the_hub_is_not_overwritten(
    links: bool, run: Run, small: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "hub" / "models--some--model"
    model = Path(shutil.copytree(small, cache / "snapshots" / "0123abcd"))
    if links:
        (cache / "blobs").mkdir()
        (model / "model.safetensors").rename(cache / "blobs" / "4567")
        (model / "model.safetensors").symlink_to("../../blobs/4567")
    why = r"is a symbolic link to .*/blobs/4567" if links else "lies in a cache of the Hub"
    with pytest.raises(RequestError, match=rf"model\.safetensors {why}: --in-place would prune"):
        run(model)
    run(model, in_place_shared=True)
    assert lowmem_gblm.verify(model)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_what_may_not_be_written_is_refused(
    name: str, run: Run, small: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: (path, mode) != (model / name, os.W_OK) and access(path, mode),
    )
    with pytest.raises(RequestError) as caught:
        run(model)
    assert str(caught.value) == (
        f"{model / name} may not be written to by this user, and --in-place has to: change its "
        f"permissions, or give an OUTPUT folder instead"
    )
    assert content(model) == content(small)


def test_a_plan_needs_no_room_for_an_output_but_for_two_blocks_on_their_way(
    small: Path, text_file: Path
) -> None:
    asked = {"method": "magnitude", "calibration": str(text_file)}
    ordinary, made = (lowmem_gblm.plan(small, **asked, in_place=one) for one in (False, True))
    total = sum(sizes(small).values())
    block = sum(size for name, size in sizes(small).items() if ".layers.0." in name)
    assert (ordinary["output_bytes"], made["output_bytes"]) == (total, 0)
    assert made["spill_bytes"] == made["predicted"]["disk_bytes"] == 2 * block
    assert made["written_bytes"] == 2 * 2 * block


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gblm"])
def test_a_plan_promises_the_bytes_that_are_read_and_the_most_that_lies_in_the_work_folder(
    method: str, run: Run, model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"method": method, "calibration": str(text_file), **SIZE}
    made = lowmem_gblm.plan(model, in_place=True, **asked)
    most = 0
    overwrite = in_place.InPlaceWriter._overwrite

    def watching(output: in_place.InPlaceWriter, path: Path) -> None:
        nonlocal most
        lying = [one for one in path.parent.iterdir() if one.is_file() and one.suffix != ".json"]
        most = max(most, sum(one.stat().st_size for one in lying))
        overwrite(output, path)

    monkeypatch.setattr(in_place.InPlaceWriter, "_overwrite", watching)
    record = run(model, method=method)
    assert record["bytes"]["read"] == made["read_bytes"]
    header_bytes = 2 * 1024
    assert 0 < most <= made["spill_bytes"] + header_bytes


def test_host_memory_does_not_stand_in_for_the_disk_because_nothing_could_be_resumed(
    run: Run, small: Path, model: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = {"calibration": str(text_file), **SIZE}
    least = lowmem_gblm.plan(model, in_place=True, **asked)["minimum"]["disk_bytes"]
    assert lowmem_gblm.plan(model, in_place=True, disk=least, **asked)["host_spill_bytes"] == 0
    with pytest.raises(BudgetError, match=r"at least .* of disk space, .* may be used"):
        run(model, disk=least - 1)
    assert content(model) == content(small)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_command_says_where_it_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def interrupt(*args: object) -> None:
        (tmp_path / "model.work" / "journal").mkdir(parents=True)
        (tmp_path / "model.work" / "journal" / "000000.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_gblm.commands.prune.pipeline.prune", interrupt)
    argv = ["prune", str(model), "--in-place", "--overwrite-my-only-copy"]
    assert main(argv) == 130
    said = capsys.readouterr().err
    assert f"What is done is kept in {model}.work." in said
    assert said.endswith(f"\nlowmem-gblm {' '.join(argv)}\n")
