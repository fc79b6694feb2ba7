"""`tools/recover`: a few steps on the embedded model; every zero stays one, where LoRA leaves none.

Skipped where peft is not installed.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_gblm

peft = pytest.importorskip("peft", reason="needs peft")

TOOL = Path(__file__).parents[2] / "tools" / "recover"
TEXT = Path(lowmem_gblm.__file__).parent / "demo" / "calibration.txt"
SHORT = ["--text", str(TEXT), "--steps", "12", "--batch", "2", "--seqlen", "64", "--windows", "8"]
pytestmark = pytest.mark.filterwarnings("ignore")


def recover(*argv: object) -> int:
    """Runs the tool in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), *map(str, argv)])
        code: int = runpy.run_path(str(TOOL))["main"]()
    return code


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in folder.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in bfloat16, at 2:4. Not to be modified."""
    folder = tmp_path_factory.mktemp("pruned")
    demo = TEXT.parent / "model"
    AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16).save_pretrained(folder / "in")
    AutoTokenizer.from_pretrained(demo).save_pretrained(folder / "in")
    lowmem_gblm.prune(folder / "in", folder / "out", method="magnitude", pattern="2:4")
    return folder / "out"


def test_it_is_better_afterwards_and_every_zero_is_one(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recover(pruned, tmp_path / "out", *SHORT) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = found["perplexity"]
    assert after < before - 0.02
    old, new = weights(pruned), weights(tmp_path / "out")
    matrices = json.loads((pruned / "pruning.json").read_text())["tensors"]
    assert old.keys() == new.keys()
    for name, weight in old.items():
        assert new[name].dtype == torch.bfloat16
        assert torch.equal((new[name] == 0) | (weight != 0), torch.ones_like(weight).bool())
        assert torch.equal(new[name], weight) == (name not in matrices)
    zeros = sum(int((new[name] == 0).sum()) for name in matrices)
    assert found["zeros"] == [sum(one["zeros"] for one in matrices.values()), zeros]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
def test_lora_would_be_refused(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(peft, "HiraConfig", peft.LoraConfig)
    assert recover(pruned, tmp_path / "out", *SHORT) == 1
    lost, zeros = map(int, re.findall(r"\d+", capsys.readouterr().err)[-2:])
    assert lost > 0.9 * zeros > 0
    assert not list(tmp_path.iterdir())
