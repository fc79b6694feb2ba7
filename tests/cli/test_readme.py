"""The README is executed: its commands, its Python, what it adds, its table and its tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import yaml

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.methods import Statistics
from lowmem_gblm.options import NoOptions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


# In place of the installed command, if the shell would find it: note the words it is given.
NOTING = """
lowmem-gblm() { type -P lowmem-gblm > /dev/null && { printf '%s\\0' "$@"; echo; } >> commands; }
"""


def test_the_commands_can_be_pasted_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell, where only the installed environment is at hand, reads them; this process runs them.

    A process for each would import torch as often. This one holds more than it would.
    """
    monkeypatch.setattr("lowmem_gblm.runtime.memory.host_resident_bytes", lambda: 400 << 20)
    (block,) = blocks("bash")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    shell = ["bash", "-euo", "pipefail", "-c", NOTING + block]
    done = subprocess.run(shell, cwd=tmp_path, env=bare, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    monkeypatch.chdir(tmp_path)
    commands = Path("commands").read_text().splitlines()
    assert len(commands) == block.count("lowmem-gblm ")
    for words in commands:
        assert main(words.split("\0")[:-1]) == 0, words
    assert Path("pruned", "pruning.json").is_file()


def test_the_workflow_prunes_and_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workflow = yaml.safe_load(next(one for one in blocks("yaml") if "jobs" in one))
    steps = workflow["jobs"]["pruning"]["steps"]
    install, *commands = [shlex.split(step["run"]) for step in steps if "run" in step]
    assert install[:2] == ["pip", "install"]
    for program, *words in commands:
        assert program == "lowmem-gblm"
        assert main(words) == 0, words
    assert Path("pruned").is_dir()


def test_the_python_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})


def test_the_recipe_prunes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(next(one for one in blocks("yaml") if "sparsity" in one))
    output, size = tmp_path / "out", {"nsamples": 2, "seqlen": 32}
    record = lowmem_gblm.prune("demo", output, recipe=tmp_path / "recipe.yaml", **size)
    assert (record["alpha"], record["pattern"]["*.self_attn.*"]) == (30, "2:4")
    assert lowmem_gblm.verify(output, "demo")["pruned_tensors"] == 28


def test_the_example_of_a_method_decides() -> None:
    namespace: dict[str, object] = {}
    exec(blocks("python")[1], namespace)
    pattern = lowmem_gblm.methods.masks.Unstructured(Decimal("0.5"))
    statistics = Statistics({"input_norm": torch.rand(8)})
    decision = namespace["METHOD"].decide(torch.randn(4, 8), statistics, pattern, NoOptions())
    assert decision.keep.sum(dim=1).tolist() == [4] * 4


BY_MEAN = """
from dataclasses import replace
from lowmem_gblm.methods import by_score
from readme_ria import METHOD
score = by_score(lambda weight, known, options: weight.abs() * known["mean_absolute"], "row")
METHOD = replace(METHOD, name="by_mean", needs=("mean_absolute",), decide=score)
"""


def test_the_examples_prune_as_the_entry_points_of_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    _, method, statistic = blocks("python")
    for name, text in (("ria", method), ("mean", statistic), ("by_mean", BY_MEAN)):
        (site / f"readme_{name}.py").write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    assert {group: list(points) for group, points in groups.items()} == {
        "lowmem_gblm.methods": ["ria"],
        "lowmem_gblm.statistics": ["mean_absolute"],
    }
    (info / "entry_points.txt").write_text(
        "[lowmem_gblm.methods]\nria = readme_ria:METHOD\nby_mean = readme_by_mean:METHOD\n"
        "[lowmem_gblm.statistics]\nmean_absolute = readme_mean:MeanAbsolute\n"
    )
    monkeypatch.syspath_prepend(site)
    for name in ("ria", "by_mean"):
        lowmem_gblm.prune("demo", tmp_path / name, method=name, nsamples=2, seqlen=32)
        assert lowmem_gblm.verify(tmp_path / name, "demo")["pruned_tensors"] == 28


@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="needs tools/install")
def test_the_demo_prints_the_table(tmp_path: Path) -> None:
    demo = [str(ROOT / "tools" / "demo"), "--output", str(tmp_path / "demo")]
    done = subprocess.run(demo, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, found = (
        re.findall(r"^(\w+) +(\d\.\d{3})  ", text, flags=re.MULTILINE)
        for text in (README, done.stdout)
    )
    assert len(found) == 6
    assert [method for method, _ in found] == [method for method, _ in expected]
    for (method, perplexity), (_, printed) in zip(found, expected, strict=True):
        assert float(perplexity) == pytest.approx(float(printed), abs=0.002), method


def test_every_file_of_the_tree_is_there() -> None:
    tree = next(block for block in blocks("text") if "pipeline.py" in block)
    for name in re.findall(r"[\w/.]+\.(?:py|md)|[\w/]+/", tree):
        found = [
            root / name for root in (ROOT, ROOT / "lowmem_gblm", ROOT / "tools", ROOT / "tests")
        ]
        assert any(path.exists() for path in found), name
