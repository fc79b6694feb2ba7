"""The streamed engine against full autograd in memory, architecture by architecture, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_gblm
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.planning.sizes import Choices
from lowmem_gblm.planning.steps import Step
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from lowmem_gblm.sweeps.context import PruneContext
from support import reference
from support.tiny_models import ARCHITECTURES, save_tiny

NSAMPLES, SEQLEN = 4, 48
SHARDED = {"llama", "mixtral"}
Statistics = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, and calibration samples for it."""

    architecture: str
    folder: Path
    text: Path
    samples: Tensor

    def in_memory(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def prune(self, output: Path, **options: object) -> dict[str, Tensor]:
        """Prune it by streaming; returns the tensors that were written."""
        options |= {"nsamples": NSAMPLES, "seqlen": SEQLEN, "calibration": str(self.text)}
        lowmem_gblm.prune(self.folder, output, **options)
        shards = sorted(output.glob("*.safetensors"))
        return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_file: Path
) -> Case:
    architecture = request.param
    folder = tmp_path_factory.mktemp(architecture) / "model"
    save_tiny(architecture, folder, sharded=architecture in SHARDED)
    tokens = AutoTokenizer.from_pretrained(folder)(text_file.read_text())["input_ids"]
    # Gemma reads nothing sensible without <bos>.
    draw = reference.text_windows_after_bos if "gemma" in architecture else reference.text_windows
    samples = draw(torch.tensor(tokens), NSAMPLES, SEQLEN, 0)
    return Case(architecture, folder, text_file, samples)


def stream_statistics(
    case: Case, folder: Path, norm: str, choices: Choices | None = None
) -> Statistics:
    """Return losses, and by name on disk gradient magnitudes and input norms of the dense model.

    They are what a run with `--activations dense` hands to its pruner.
    """
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    finish, prune = PruneContext.finish, BlockPruner.prune

    def finishing(run: PruneContext, step: Step) -> None:
        losses.extend(run.losses if step.stage == "head" else [])
        finish(run, step)

    def pruning(pruner: BlockPruner, block: Block, measured, arriving) -> None:
        magnitudes = [None if one is None else one.clone() for one in arriving]
        for weight, found in zip(block.weights, magnitudes, strict=True):
            empty = torch.zeros(weight.out_features, weight.in_features)
            gradients[weight.name] = empty if found is None else found.clone()
            norms[weight.name] = found_norm(measured[0], weight)
        prune(pruner, block, measured, magnitudes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PruneContext, "finish", finishing)
        patch.setattr(BlockPruner, "prune", pruning)
        for name in ("_in_memory", "_on_disk") if choices else ():
            patch.setattr(f"lowmem_gblm.planning.planner.{name}", lambda *args: iter([choices]))
        case.prune(folder, method="gblm", activations="dense", gradient_norm=norm)
    return losses, gradients, norms


def found_norm(statistic, weight) -> Tensor:
    found = statistic.result(weight.slot)
    return torch.zeros(weight.in_features) if found is None else found


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_streamed_statistics_are_those_of_full_autograd_to_the_bit(
    case: Case, norm: str, tmp_path: Path
) -> None:
    losses, gradients, norms = stream_statistics(case, tmp_path / "spill", norm)
    model = case.in_memory()
    expected_losses, expected = reference.losses_and_gradients(model, case.samples, norm)
    expected_norms = reference.input_statistics(
        model, case.samples, range(model.config.num_hidden_layers), "norm"
    )
    assert losses == [float(loss) for loss in expected_losses]
    assert gradients.keys() == expected.keys() == expected_norms.keys()
    for name in expected:
        assert torch.equal(gradients[name], expected[name]), name
        assert torch.equal(norms[name], expected_norms[name]), name


@pytest.fixture(scope="module")
def plain(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return stream_statistics(case, tmp_path_factory.mktemp("plain") / "out", "l1")


@pytest.mark.parametrize(
    ("interval", "limit"),
    [
        (2, 1 << 14),
        pytest.param(2, None, marks=pytest.mark.slow),
        pytest.param(3, 1 << 14, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=pytest.mark.slow),
    ],
)
def test_recomputed_boundaries_and_sliced_accumulators_change_no_bit(
    case: Case, interval: int, limit: int | None, plain: Statistics, tmp_path: Path
) -> None:
    choices = Choices(boundary_interval=interval, accumulator_bytes=limit)
    other = stream_statistics(case, tmp_path / "other", "l1", choices)
    assert plain[0] == other[0]
    for expected, found in zip(plain[1:], other[1:], strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("method", "norm", "sparsity", "n_of_m", "activations"),
    [
        ("gblm", "l1", "0.5", None, "pruned"),
        ("gblm", "l1", "0.5", None, "dense"),
        ("gblm", "l2", None, (2, 4), "dense"),
        ("wanda", "l1", "0.6", None, "pruned"),
        ("gradient", "l2", "0.3", None, "pruned"),
        ("magnitude", "l1", "0.5", None, "pruned"),
        ("sparsegpt", "l1", "0.5", None, "dense"),
        ("sparsegpt", "l1", None, (2, 4), "pruned"),
        pytest.param("gblm", "l2", None, (2, 4), "pruned", marks=pytest.mark.slow),
        pytest.param("wanda", "l1", "0.6", None, "dense", marks=pytest.mark.slow),
        pytest.param("gradient", "l2", "0.3", None, "dense", marks=pytest.mark.slow),
        pytest.param("magnitude", "l1", "0.5", None, "dense", marks=pytest.mark.slow),
        pytest.param("sparsegpt", "l1", "0.5", None, "pruned", marks=pytest.mark.slow),
        pytest.param("sparsegpt", "l1", None, (2, 4), "dense", marks=pytest.mark.slow),
    ],
)
def test_streamed_pruning_writes_what_pruning_in_memory_gives(
    case: Case,
    method: str,
    norm: str,
    sparsity: str | None,
    n_of_m: tuple[int, int] | None,
    activations: str,
    tmp_path: Path,
) -> None:
    model = case.in_memory()
    reference.prune(
        model, case.samples, method=method, sparsity=sparsity, n_of_m=n_of_m, norm=norm,
        activations=activations,
    )  # fmt: skip
    pattern = None if n_of_m is None else f"{n_of_m[0]}:{n_of_m[1]}"
    options = {"gradient_norm": norm} if method in ("gblm", "gradient") else {}
    written = case.prune(
        tmp_path / "out", method=method, sparsity=sparsity, pattern=pattern,
        activations=activations, **options,
    )  # fmt: skip
    for matrix in reference.prunable(model):
        on_disk = written[matrix.name]
        expected = matrix.view().T if case.architecture == "gpt2" else matrix.view()
        if method == "sparsegpt":
            torch.testing.assert_close(on_disk, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(on_disk == 0, expected == 0), matrix.name
        if method != "sparsegpt":
            assert torch.equal(on_disk, expected), matrix.name


def test_the_chunked_head_gives_the_loss_and_gradient_of_the_whole_one(
    llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = opened_and_filled(llama)
    tokens = torch.arange(5, 53)[None]
    hidden = streamed.embed(tokens)
    whole_loss, whole_gradient = streamed.loss_and_gradient(hidden, tokens)
    monkeypatch.setattr(
        "lowmem_gblm.model.streamed_model.HEAD_LOGITS", 7 * streamed.config.vocab_size
    )
    rows = largest_logits(monkeypatch)
    loss, gradient = streamed.loss_and_gradient(hidden, tokens)
    assert max(rows) == 7
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(gradient, whole_gradient)


def largest_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many rows of logits each call of the loss sees."""
    rows: list[int] = []
    original = torch.nn.functional.cross_entropy

    def counting(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
        rows.append(len(logits))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", counting)
    return rows


def opened_and_filled(folder: Path):
    opened = open_model(str(folder), Resources())
    opened.streamed.fill(opened.checkpoint)
    return opened.streamed
