"""The README is executed: its pasted commands, its Python, its example of a method, its table."""

from __future__ import annotations

import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest
import torch

import lowmem_gblm
from lowmem_gblm.cli import main
from lowmem_gblm.methods import Statistics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line.removeprefix("$ lowmem-gblm")) for line in lines]


def test_the_commands_work_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(commands()) == 5
    for command in commands():
        assert main(command) == 0, command


def test_the_python_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})


def test_the_example_of_a_method_decides() -> None:
    namespace: dict[str, object] = {}
    exec(blocks("python")[1], namespace)
    pattern = lowmem_gblm.masks.Unstructured(Decimal("0.5"))
    statistics = Statistics(input_norm=torch.rand(8))
    decision = namespace["METHOD"].decide(torch.randn(4, 8), statistics, pattern, 0.0)
    assert decision.keep.sum(dim=1).tolist() == [4] * 4


def test_the_table_of_the_demo_is_true(tmp_path: Path) -> None:
    """Perplexities of two rows; `tools/demo` prints them all."""
    table = dict(re.findall(r"^(\w+) +(\d\.\d{3}) ", README, flags=re.MULTILINE))
    rows = lowmem_gblm.compare("demo", ["magnitude", "wanda"], tmp_path / "out", seqlen=256)
    for row in rows:
        assert row["perplexity"] == pytest.approx(float(table[row["method"]]), abs=0.002)


def test_every_file_of_the_tree_is_there() -> None:
    tree = next(block for block in blocks("text") if "pipeline.py" in block)
    for name in re.findall(r"[\w/.]+\.(?:py|md)|\w+/", tree):
        found = [
            root / name for root in (ROOT, ROOT / "lowmem_gblm", ROOT / "tools", ROOT / "tests")
        ]
        assert any(path.exists() for path in found), name
