"""Experts that are modules of their own, as in code that comes with checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import lowmem_gblm
from lowmem_gblm.model.matmul_tap import Tap
from support.tiny_models import save_tiny

EXPERTS = 8
SIZE = {"nsamples": 6, "seqlen": 4}


class Mixture(nn.Module):
    """Every token goes to two of eight; an expert without tokens is not called."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.router(flat).topk(2).indices
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).any(-1).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]))
        return out.reshape(hidden.shape)


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    made = LlamaDecoderLayer.__init__

    def make(self: LlamaDecoderLayer, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.mlp = Mixture(config)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", make)
    return save_tiny("llama", tmp_path / "model", blocks=3, width=16)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Which matrices each sample has seen in each block."""
    found: list[set[str]] = []
    enter, leave = Tap.__enter__, Tap.__exit__

    def entering(self: Tap) -> Tap:
        found.append(set())
        return enter(self)

    def leaving(self: Tap, *error: Any) -> None:
        found[-1] |= {slot.parameter for slot in self._seen}
        leave(self, *error)

    monkeypatch.setattr(Tap, "__enter__", entering)
    monkeypatch.setattr(Tap, "__exit__", leaving)
    return found


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gradient", "gblm"])
def test_a_sample_need_not_meet_every_expert(
    method: str,
    activations: str,
    mixture: Path,
    seen: list[set[str]],
    prune_in_place: Callable[..., Any],
    text_file: Path,
    tmp_path: Path,
) -> None:
    options = {**SIZE, "method": method, "activations": activations}
    lowmem_gblm.prune(mixture, tmp_path / "out", calibration=str(text_file), **options)
    model = Path(shutil.copytree(mixture, tmp_path / "copy"))
    prune_in_place(model, **options)
    everything = set().union(*seen)
    assert any(sample < everything for sample in seen)
    assert len({frozenset(sample) for sample in seen}) > 2
    lowmem_gblm.verify(tmp_path / "out", against=mixture)
    assert tensors(model) == tensors(tmp_path / "out")


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: one.numpy().tobytes() for name, one in load_file(path).items()}
    return found


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_evaluation_of_few_windows_need_not_meet_every_expert(
    kind: str, mixture: Path, text_file: Path
) -> None:
    size = {"text": str(text_file), "seqlen": 4, "windows": 1}
    found = lowmem_gblm.evaluate(mixture, compute_weights=kind, **size)["perplexity"]
    exact = lowmem_gblm.evaluate(mixture, **size)["perplexity"]
    assert math.log(found) == pytest.approx(math.log(exact), rel=0.1)
