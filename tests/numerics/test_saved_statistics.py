"""Statistics that an earlier run has saved: the masks are those of a run that measures all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowmem_gblm
from lowmem_gblm.commands.plan import plan_request
from lowmem_gblm.commands.prune import scope
from lowmem_gblm.commands.request import prune_request
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from support.crashes import content
from support.tiny_models import save_tiny

DENSE = {"activations": "dense"}
# What may differ from the run that has saved its statistics, with dense activations.
OTHERS: dict[str, dict[str, Any]] = {
    "sparsity": {"sparsity": 0.7},
    "pattern": {"pattern": "2:4"},
    "alpha": {"alpha": 1},
    "wanda": {"method": "wanda", "sparsity": 0.3},
    "gradient": {"method": "gradient"},
}


class Case:
    """A model and the statistics of a run of gblm with dense activations."""

    def __init__(self, model: Path, folder: Path, text: Path) -> None:
        self.model = model
        self.saved = folder / "statistics"
        self.size = {"nsamples": 3, "seqlen": 24, "calibration": str(text)}
        self.prune(folder / "saving", save_statistics=str(self.saved), **DENSE)

    def prune(self, output: Path, **options: Any) -> dict[str, Any]:
        """Prunes by statistics that are measured."""
        return lowmem_gblm.prune(self.model, output, **self.size | options)

    def reuse(self, output: Path, **options: Any) -> dict[str, Any]:
        """Prunes by the saved statistics; without a word on samples or text."""
        return lowmem_gblm.prune(self.model, output, statistics=str(self.saved), **options)


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def case(
    request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, folder / "model", blocks=2, width=32)
    return Case(model, folder, text_file)


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run fails that opens a text or runs a sample."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a sample is wanted")

    monkeypatch.setattr(scope, "open_source", fail)
    monkeypatch.setattr(StreamedModel, "embed", fail)
    monkeypatch.setattr(StreamedModel, "forward_block", fail)


@pytest.mark.parametrize("name", OTHERS)
def test_dense_statistics_serve_exactly(
    name: str, case: Case, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = DENSE | OTHERS[name]
    measured = case.prune(tmp_path / "measured", **options)
    request.getfixturevalue("no_samples")
    taken = case.reuse(tmp_path / "taken", **options)
    assert content(tmp_path / "taken") == content(tmp_path / "measured")
    for part in ("tensors", "nsamples", "seqlen", "seed", "calibration"):
        assert taken[part] == measured[part], part
    tokens = [record["fingerprints"]["calibration_tokens"] for record in (taken, measured)]
    assert tokens[0] == tokens[1]
    assert taken["statistics"]["taken"] == measured["statistics"]["measured"]
    assert taken["statistics"]["measured"] == []
    assert taken["seconds"].keys() == {"prune", "finish", "total"}


def test_gradients_serve_where_activations_are_those_of_the_pruned_model(
    case: Case, tmp_path: Path
) -> None:
    case.prune(tmp_path / "measured", sparsity=0.6)
    record = case.reuse(tmp_path / "taken", sparsity=0.6)
    assert content(tmp_path / "taken") == content(tmp_path / "measured")
    assert record["seconds"].keys() == {"embed", "prune", "finish", "total"}
    told = f"gradient_l1 taken from {case.saved.name}; input_norm measured again"
    assert told in record["notes"]


def test_in_place_serves_too(
    case: Case, tmp_path: Path, prune_in_place: Callable[..., dict[str, Any]]
) -> None:
    copy = shutil.copytree(case.model, tmp_path / "model")
    case.reuse(tmp_path / "out", **DENSE, sparsity=0.6)
    prune_in_place(copy, statistics=case.saved, **DENSE, sparsity=0.6, **case.size)
    pruned = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    expected = {name: tensor for shard in pruned for name, tensor in shard.items()}
    found = load_file(copy / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gram_matrices_serve(case: Case, tmp_path: Path) -> None:
    saved, options = tmp_path / "grams", {"method": "sparsegpt", **DENSE}
    case.prune(tmp_path / "saving", save_statistics=saved, **options)
    case.prune(tmp_path / "measured", pattern="2:4", **options)
    lowmem_gblm.prune(case.model, tmp_path / "taken", statistics=saved, pattern="2:4", **options)
    assert content(tmp_path / "taken") == content(tmp_path / "measured")


def test_saving_changes_nothing_and_what_is_saved_is_what_the_pruner_got(
    case: Case, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    statistics_of = BlockPruner._statistics

    def watched(pruner: BlockPruner, weight: Any, *args: Any) -> Any:
        found = statistics_of(pruner, weight, *args)
        seen.update({f"{weight}/{name}": value.clone() for name, value in found.items()})
        return found

    monkeypatch.setattr(BlockPruner, "_statistics", watched)
    case.prune(tmp_path / "out", **DENSE)
    assert content(tmp_path / "out") == content(case.saved.parent / "saving")
    files = [load_file(path) for path in sorted(case.saved.glob("*.safetensors"))]
    saved = {name: tensor for file in files for name, tensor in file.items()}
    assert saved.keys() == seen.keys()
    assert all(torch.equal(saved[name], seen[name]) for name in seen)


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 2**-8), ("int8", 0.2)])
def test_magnitudes_may_be_saved_in_fewer_bits(
    dtype: str, largest: float, case: Case, tmp_path: Path
) -> None:
    saved = tmp_path / "rounded"
    case.prune(tmp_path / "saving", save_statistics=saved, statistics_dtype=dtype, **DENSE)
    assert content(tmp_path / "saving") == content(case.saved.parent / "saving")
    options = {"method": "gradient", **DENSE}
    record = lowmem_gblm.prune(case.model, tmp_path / "taken", statistics=saved, **options)
    told = (
        f"gradient magnitudes in {saved.name} are rounded to {dtype}: some decisions will be others"
    )
    assert any(note.startswith(told) for note in record["notes"])
    case.prune(tmp_path / "measured", **options)
    pairs = [
        (load_file(tmp_path / "taken" / path.name), load_file(path))
        for path in (tmp_path / "measured").glob("*.safetensors")
    ]
    decided = [
        (one[name] == 0, other[name] == 0)
        for one, other in pairs
        for name in one
        if one[name].dim() == 2
    ]
    differing = sum(int((one != other).sum()) for one, other in decided)
    assert 0 < differing < largest * sum(one.numel() for one, _ in decided)
    size = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert size < 0.6 * sum(path.stat().st_size for path in case.saved.glob("*.safetensors"))


def test_the_plan_counts_what_is_saved_and_taken(case: Case, tmp_path: Path) -> None:
    def plan(**options: Any) -> dict[str, Any]:
        request = prune_request(str(case.model), **options)
        return plan_request(request, measured=False).as_json()

    plain = plan(**case.size, **DENSE)
    saving = plan(save_statistics=tmp_path / "s", **case.size, **DENSE)
    files = sum(path.stat().st_size for path in case.saved.glob("*.safetensors"))
    assert 0.8 * files < saving["statistics_bytes"] < files
    for name in ("written_bytes", "disk_bytes"):
        before, after = (one.get(name) or one["predicted"][name] for one in (plain, saving))
        assert after - before == saving["statistics_bytes"], name
    taking = plan(statistics=case.saved, **DENSE)
    assert taking["stages"] == ["prune"]
    assert taking["flops"] == 0
    assert taking["statistics_bytes"] == 0
    magnitude = plan(method="magnitude")
    assert taking["read_bytes"] - magnitude["read_bytes"] == 2 * saving["statistics_bytes"]
    partly = plan(statistics=case.saved)
    assert partly["stages"] == ["embed", "prune"]
    assert partly["flops"] == plan(method="wanda", **case.size)["flops"]
