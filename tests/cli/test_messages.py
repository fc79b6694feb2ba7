"""Sentences that no other test has a place for: each is met as a person would meet it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.prune import identity
from lowmem_gblm.errors import (
    BudgetError,
    CheckpointError,
    JobError,
    NonFiniteError,
    RequestError,
    UnsupportedModel,
)
from lowmem_gblm.runtime import machine
from lowmem_gblm.storage import in_place
from support.crashes import stopped_at
from untrusted.test_remote_code import edit, modules_of_strangers  # noqa: F401

SIZE = {"nsamples": 3, "seqlen": 16}
Prune = Callable[..., dict[str, Any]]


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "model"))


@pytest.fixture
def prune(model: Path, text_file: Path) -> Prune:
    """Prunes the model into a folder, or in place."""

    def prune(output: Path | None, **options: Any) -> dict[str, Any]:
        return lowmem_gblm.prune(
            model, output, **{"calibration": str(text_file), **SIZE, **options}
        )

    return prune


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other weights."""
    tensors = {name: one.clone() for name, one in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# What is typed.


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        ("eval demo --windows 0", 2, "--windows must be at least 1; got 0"),
        ("eval demo --seqlen 1", 2, "--seqlen must be at least 2 tokens; got 1"),
        ("compare demo --windows -1", 2, "--windows must be at least 1; got -1"),
        ("compare demo --methods wanda,gblm,wanda", 2, "--methods names the method wanda twice"),
        (
            "resume out.work",
            5,
            "out.work holds no job: give the OUTPUT.work folder of an interrupted run",
        ),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    argv: str,
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == code
    assert capsys.readouterr().err == f"lowmem-gblm: {sentence}\n"
    assert not list(tmp_path.iterdir())


def test_an_option_that_is_none_of_its_choices_is_refused(prune: Prune, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        prune(tmp_path / "out", activations="both")
    assert str(caught.value) == "--activations must be one of pruned, dense; got 'both'"


def test_a_job_whose_folder_was_renamed_is_not_gone_on_with(
    prune: Prune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at(prune, tmp_path / "out", "dense", 1)
    renamed = (tmp_path / "out.work").rename(tmp_path / "other.work")
    assert main(["resume", str(renamed)]) == 5
    assert capsys.readouterr().err == (
        f"lowmem-gblm: {renamed} was renamed: call it out.work again, as the job in it does\n"
    )


# What lies on a disk.


def test_a_file_of_somebody_else_is_refused(
    prune: Prune, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the tests may be allowed to read everything."""
    access = os.access

    def forbidden(path: Any, mode: int, **options: Any) -> bool:
        return Path(path).name != "model.safetensors" and access(path, mode, **options)

    monkeypatch.setattr(os, "access", forbidden)
    with pytest.raises(CheckpointError) as caught:
        prune(tmp_path / "out")
    assert str(caught.value) == f"{model}/model.safetensors may not be read by this user"


@pytest.mark.parametrize(
    ("full", "what", "way_out"),
    [
        ("out", "the output", "OUTPUT"),
        ("out.work", "what is stored between passes", "--work-dir"),
    ],
)
def test_each_of_two_disks_must_have_room(
    full: str,
    what: str,
    way_out: str,
    prune: Prune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "same_disk", lambda one, other: one == other)
    monkeypatch.setattr(
        machine, "free_disk_bytes", lambda folder: 0 if folder.name == full else 1 << 40
    )
    sentence = (
        rf"^{what} needs \S+ \S+ of disk space in {tmp_path}, 0 B are free: make room, or choose "
        rf"another {way_out}$"
    )
    with pytest.raises(BudgetError, match=sentence):
        prune(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_hidden_states_that_are_lost_while_they_wait_are_told(
    damage: Callable[[Path], object], prune: Prune, tmp_path: Path
) -> None:
    waiting = tmp_path / "out.work" / "embedded-0"

    def listener(tick: Any) -> None:
        if (tick.stage, tick.step) == ("head", 1):
            damage(waiting)

    with pytest.raises(JobError) as caught:
        prune(tmp_path / "out", listener=listener)
    assert str(caught.value) == (
        f"{waiting} is missing or damaged: look at the disk; to start over, remove {waiting.parent}"
    )


def test_new_weights_that_become_shorter_while_they_are_copied_are_told(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = in_place.read_header

    def cut(path: Path) -> Any:
        header = read(path)
        os.truncate(path, 100)
        return header

    monkeypatch.setattr(in_place, "read_header", cut)
    with pytest.raises(JobError) as caught:
        prune(None, method="magnitude", in_place=True, overwrite_my_only_copy=True)
    assert str(caught.value).startswith(
        f"{tmp_path}/model.work/overwrites-00000.safetensors is damaged: it has become shorter. It "
        f"holds what was being written over weights in {tmp_path}/model, which cannot be finished "
        f"without it: look at the disk, and fetch the model anew. {tmp_path}/model is partly "
    )


# Numbers that become too large, though every weight is one.


def kept(output: Path) -> str:
    """What is said of a job that has finished steps."""
    work = output.with_name(f"{output.name}.work")
    return (
        f". What is done is kept in {work}: lowmem-gblm resume {work} resumes it; to discard it, "
        f"remove {work} and {output}.partial"
    )


@pytest.fixture
def wide(model: Path) -> Path:
    """The same function, but inputs of one block are near 10**18.

    The squares of one sample can be added up in float32, those of sixteen samples cannot.
    """
    block, factor = "model.layers.1.", 2.0**61

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{block}input_layernorm.weight"] *= factor
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{block}self_attn.{name}.weight"] /= factor

    edit_tensors(model, change)
    return model


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"method": "gblm", "activations": "dense"},
            "the statistics of block 1 overflow float32, though those of every single sample are "
            "finite: fewer --nsamples may fit",
        ),
        (
            {"method": "wanda"},
            "model.layers.1.self_attn.k_proj.weight: 128 of 128 scores are not finite",
        ),
    ],
)
@pytest.mark.usefixtures("wide")
def test_statistics_that_overflow_together_stop_the_job(
    options: dict, sentence: str, prune: Prune, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        prune(tmp_path / "out", nsamples=16, **options)
    assert str(caught.value) == sentence + kept(tmp_path / "out")


def test_updated_weights_that_overflow_stop_the_job(
    prune: Prune, model: Path, tmp_path: Path
) -> None:
    """Inputs are alike, so one weight takes over what another one did, beyond float16."""
    block = "model.layers.0.self_attn."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{block}v_proj.weight"][:] = tensors[f"{block}v_proj.weight"][0]
        tensors[f"{block}o_proj.weight"].fill_(40_000)
        tensors |= {name: one.half() for name, one in tensors.items()}

    edit_tensors(model, change)
    with pytest.raises(NonFiniteError) as caught:
        prune(tmp_path / "out", method="sparsegpt")
    sentence = f"{block}o_proj.weight: updated weights overflow torch.float16"
    assert str(caught.value) == sentence + kept(tmp_path / "out")


# What a model does that brings its own code.

OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class OwnForCausalLM(LlamaForCausalLM):
    config_class = LlamaConfig
"""
NO_DECODER = """
    def get_decoder(self):
        raise NotImplementedError("not yet. Come back later")
"""
EARLY_EXIT = """
    def __init__(self, config):
        super().__init__(config)
        self.model.config = LlamaConfig(**(config.to_dict() | {"num_hidden_layers": 1}))
"""
ANGLES_OF_A_SAMPLE = """
    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb.register_forward_hook(
            lambda module, given, angles: tuple(one * given[0].mean() for one in angles)
        )
"""
# All samples but the first go another way through the feed-forward layers.
TWO_WAYS = """
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = TwoWays(config)
        self.post_init()


class TwoWays(LlamaMLP):
    first = None

    def forward(self, hidden):
        if self.first is None:
            self.first = hidden.detach().clone()
        if torch.equal(hidden, self.first):
            return super().forward(hidden)
        return self.another_way(hidden)

    def another_way(self, hidden):
"""
ANOTHER_ORDER = f"""{TWO_WAYS}
        return super().forward(hidden) + 0 * self.gate_proj(hidden).sum()
"""
ANOTHER_INPUT = f"""{TWO_WAYS}
        gate = self.act_fn(self.gate_proj(hidden))
        return self.down_proj(gate * self.up_proj(hidden.clone()))
"""


@pytest.mark.parametrize(
    ("code", "method", "sentence"),
    [
        (NO_DECODER, "gblm", "OwnForCausalLM has no decoder: not yet"),
        (
            EARLY_EXIT,
            "gblm",
            "a forward pass calls 1 of 2 decoder blocks: such a model cannot be streamed block by "
            "block",
        ),
        (
            ANGLES_OF_A_SAMPLE,
            "gblm",
            "decoder block 0 is called with arguments that depend on the sample",
        ),
        (
            ANOTHER_ORDER,
            "gblm",
            "mlp.gate_proj.weight does not come in the same order in every sample: such a model is "
            "not followed here",
        ),
        (
            ANOTHER_INPUT,
            "sparsegpt",
            "mlp.up_proj.weight shares its input in some samples only: such a model is not "
            "followed here",
        ),
    ],
    ids=["no decoder", "early exit", "angles of a sample", "another order", "another input"],
)
def test_own_code_that_cannot_be_followed_is_refused(
    code: str, method: str, sentence: str, prune: Prune, model: Path, tmp_path: Path
) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (model / "modeling_own.py").write_text(OWN + code)
    with pytest.raises(UnsupportedModel) as caught:
        prune(tmp_path / "out", method=method, trust_remote_code=True)
    work = tmp_path / "out.work"
    assert str(caught.value) == sentence + kept(tmp_path / "out") * work.exists()
    assert work.exists() == (code in (ANOTHER_ORDER, ANOTHER_INPUT))


# What is noted.


def test_a_package_that_is_not_there_is_no_fault(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    identity.versions.cache_clear()
    versions = prune(tmp_path / "out", method="magnitude")["versions"]
    identity.versions.cache_clear()
    assert versions["bitsandbytes"] == "not installed"
    assert versions["torch"] == version("torch")
