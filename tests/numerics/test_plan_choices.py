"""However a plan is carried out, the decisions are the same; rounded stores agree nearly always."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem_gblm
from lowmem_gblm.planning.sizes import Choices
from support.tiny_models import save_tiny

SIZE = {"nsamples": 3, "seqlen": 32}
EXACT = {
    "nothing ahead, nothing behind": Choices(read_ahead=False, behind_bytes=0),
    "everything behind": Choices(behind_bytes=1 << 30),
    "one boundary kept": Choices(boundary_interval=9),
    "every second boundary": Choices(boundary_interval=2),
    "a matrix at a time": Choices(accumulator_bytes=1),
    "all of it": Choices(
        read_ahead=False, behind_bytes=0, boundary_interval=2, accumulator_bytes=1 << 14
    ),
}


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch):
    """Makes plans choose what a test wants."""

    def choose(choices: Choices) -> None:
        for name in ("_in_memory", "_on_disk"):
            path = f"lowmem_gblm.planning.planner.{name}"
            monkeypatch.setattr(path, lambda *args: iter([choices]))

    return choose


def written(output: Path) -> dict[str, torch.Tensor]:
    shards = sorted(output.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.fixture(scope="module", params=product(["llama", "mixtral"], ["pruned", "dense"]), ids=str)
def job(
    request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, dict[str, torch.Tensor]]:
    """What is asked for, and what a run writes that chooses for itself."""
    architecture, activations = request.param
    folder = tmp_path_factory.mktemp("plain")
    asked = {"activations": activations, "calibration": str(text_file), **SIZE}
    asked["model"] = save_tiny(architecture, folder / "model")
    lowmem_gblm.prune(output=folder / "out", **asked)
    return asked, written(folder / "out")


@pytest.mark.parametrize("choices", EXACT.values(), ids=EXACT)
def test_exact_choices_change_no_bit(job, choices: Choices, choose, tmp_path: Path) -> None:
    asked, plain = job
    choose(choices)
    record = lowmem_gblm.prune(output=tmp_path / "other", **asked)
    assert record["choices"]["boundary_interval"] == choices.boundary_interval
    other = written(tmp_path / "other")
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(("store", "least"), [("bfloat16", 0.999), ("int8", 0.994)])
def test_rounded_stores_agree_and_say_so(store: str, least: float, choose, tmp_path: Path) -> None:
    options = {"nsamples": 8, "seqlen": 128, "calibration": "demo"}
    lowmem_gblm.prune("demo", tmp_path / "plain", **options)
    choose(Choices(gradient_precision=store))
    record = lowmem_gblm.prune("demo", tmp_path / "other", **options)
    assert "gradient magnitudes are stored in" in record["notes"][0]
    plain, other = written(tmp_path / "plain"), written(tmp_path / "other")
    same = sum(int(((plain[name] == 0) == (other[name] == 0)).sum()) for name in record["tensors"])
    total = sum(plain[name].numel() for name in record["tensors"])
    assert least <= same / total < 1


@pytest.mark.parametrize(
    "method", ["gblm", "sparsegpt", pytest.param("wanda", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_masks_from_small_weights_go_to_the_whole_ones(
    architecture: str, kind: str, method: str, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(architecture, tmp_path / "model", width=64)
    options = {"method": method, "calibration": str(text_file), **SIZE}
    record = lowmem_gblm.prune(model, tmp_path / "out", compute_weights=kind, **options)
    assert record["compute_weights"] == kind
    lowmem_gblm.verify(tmp_path / "out", against=model)
    lowmem_gblm.prune(model, tmp_path / "plain", **options)
    other, plain = written(tmp_path / "out"), written(tmp_path / "plain")
    same = sum(int(((plain[name] == 0) == (other[name] == 0)).sum()) for name in record["tensors"])
    total = sum(plain[name].numel() for name in record["tensors"])
    assert (0.9 if kind == "int8" else 0.7) < same / total < 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_perplexity_with_small_weights_is_near(kind: str) -> None:
    options = {"text": "demo", "seqlen": 128, "windows": 4}
    whole = lowmem_gblm.evaluate("demo", **options)["perplexity"]
    small = lowmem_gblm.evaluate("demo", compute_weights=kind, **options)["perplexity"]
    assert small == pytest.approx(whole, rel=0.1)
    assert small != whole


def test_the_record_says_how_it_was_done(text_file: Path, llama: Path, tmp_path: Path) -> None:
    lowmem_gblm.prune(llama, tmp_path / "out", calibration=str(text_file), **SIZE)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["choices"].keys() == Choices().__dict__.keys()
    assert record["waited_seconds"].keys() == record["seconds"].keys() - {"total"}
