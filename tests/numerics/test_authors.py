"""The streamed tool against what the authors' published code decides on a real trained model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import lowmem_gblm

# Their magnitude and SparseGPT thresholds are `<=`, which removes one weight more per comparison
# group: one a matrix for magnitude; one per column block for SparseGPT, felt by later columns.
CASES = {
    "wanda/0.3": 0.9995,
    "wanda/0.5": 0.9995,
    "wanda/0.6": 0.9995,
    "wanda/2:4": 0.9995,
    "gradient/l1/0.5": 0.9995,
    "gradient/l2/0.5": 0.9995,
    "gblm/l1/0.3": 0.9995,
    "gblm/l1/0.5": 0.9995,
    "gblm/l1/0.6": 0.9995,
    "gblm/l1/2:4": 0.9995,
    "gblm/l2/0.3": 0.9995,
    "gblm/l2/0.5": 0.9995,
    "gblm/l2/0.6": 0.9995,
    "gblm/l2/2:4": 0.9995,
    "magnitude/2:4": 0.9995,
    "sparsegpt/0.3": 0.99,
    "sparsegpt/0.5": 0.99,
    "sparsegpt/0.6": 0.99,
    "sparsegpt/2:4": 0.99,
}


# Every method and norm is among them, at 50 % or 2:4; the others are slow.
CHOSEN = {
    "wanda/2:4",
    "gradient/l1/0.5",
    "gradient/l2/0.5",
    "gblm/l1/0.5",
    "gblm/l1/2:4",
    "magnitude/2:4",
    "sparsegpt/0.5",
    "sparsegpt/2:4",
}


# Of these perplexity is not measured, which takes as long as pruning: their weights follow from
# their decisions, because methods without updates keep the others as they are.
DECISIONS_ALONE = CHOSEN - {"gblm/l1/0.5", "sparsegpt/0.5", "sparsegpt/2:4"}


@dataclass(frozen=True)
class Authors:
    """Their results, and the model and texts they are about."""

    shared: Path

    @property
    def model(self) -> Path:
        return self.shared / "real" / "models" / "stories260K"

    def text(self, split: str) -> str:
        return str(self.shared / "real" / "text" / f"tinystories_{split}.txt")

    def perplexity(self, case: str) -> float:
        results = json.loads((self.shared / "reference" / "stories260K.json").read_text())
        return results["results"][case]["perplexity"]

    def zeros(self, case: str) -> dict[str, np.ndarray]:
        """Flattened zero positions, packed, by parameter."""
        with np.load(self.shared / "reference" / "stories260K_zeros.npz") as packed:
            return {
                key.split("|")[1]: packed[key] for key in packed.files if key.split("|")[0] == case
            }

    def prune(self, case: str, output: Path) -> None:
        method, *norm, amount = case.split("/")
        amount_option = "pattern" if ":" in amount else "sparsity"
        options = {"gradient_norm": norm[0]} if norm else {}
        lowmem_gblm.prune(
            self.model, output, method=method, nsamples=32, seqlen=256,
            calibration=self.text("calibration"), **options, **{amount_option: amount},
        )  # fmt: skip

    def measure(self, model: Path) -> float:
        text = self.text("evaluation")
        return lowmem_gblm.evaluate(model, text=text, seqlen=256, windows=100)["perplexity"]


@pytest.fixture(scope="module")
def authors(shared: Path) -> Authors:
    return Authors(shared)


def differences(authors: Authors, case: str, output: Path) -> dict[str, tuple[int, int]]:
    """By parameter: how many decisions differ, of how many."""
    written = {
        name: tensor
        for shard in output.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    counts = {}
    for name, packed in authors.zeros(case).items():
        tensor = written[name if name in written else f"{name}.weight"]
        zeros = np.unpackbits(packed)[: tensor.numel()].reshape(tensor.shape)
        counts[name] = int(((tensor == 0).numpy() != zeros).sum()), tensor.numel()
    return counts


@pytest.mark.parametrize(
    ("case", "least"),
    [
        pytest.param(*one, marks=() if one[0] in CHOSEN else pytest.mark.slow)
        for one in CASES.items()
    ],
)
def test_decisions_and_perplexity_are_the_authors(
    authors: Authors, case: str, least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authors.prune(case, tmp_path / "out")
    counts = differences(authors, case, tmp_path / "out").values()
    agreement = 1 - sum(differ for differ, _ in counts) / sum(size for _, size in counts)
    with capsys.disabled():
        print(f"\n{case:16} agreement {agreement:8.4%}", end="")
    assert len(counts) == 35
    assert agreement >= least
    if case in DECISIONS_ALONE:
        return
    perplexity, theirs = authors.measure(tmp_path / "out"), authors.perplexity(case)
    with capsys.disabled():
        print(f"   perplexity {perplexity:8.4f}, theirs {theirs:8.4f}", end="")
    assert perplexity == pytest.approx(theirs, rel=0.01)


def test_magnitude_differs_by_at_most_one_weight_a_matrix(authors: Authors, tmp_path: Path) -> None:
    authors.prune("magnitude/0.5", tmp_path / "out")
    counts = differences(authors, "magnitude/0.5", tmp_path / "out")
    assert len(counts) == 35
    assert all(differ <= 1 for differ, _ in counts.values())
    theirs = authors.perplexity("magnitude/0.5")
    assert authors.measure(tmp_path / "out") == pytest.approx(theirs, rel=0.01)


def test_dense_perplexity_is_the_authors(authors: Authors) -> None:
    assert authors.measure(authors.model) == pytest.approx(authors.perplexity("dense/0"), rel=1e-4)
