"""The benchmark: its checkpoints are real ones, its baseline decides alike, its figures add up."""

from __future__ import annotations

import io
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowmem_gblm
from support.tools import TOOLS, load_tool

TEXT = Path(lowmem_gblm.__file__).parent / "demo" / "calibration.txt"
NSAMPLES, SEQLEN = 3, 48


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """Imports a module of the tools by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        # A folder of caches would be taken for a tool.
        patch.setattr(sys, "dont_write_bytecode", True)
        yield import_module


@pytest.fixture(scope="module")
def model(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated checkpoint. Not to be modified."""
    return write(tool("bench_model"), tmp_path_factory.mktemp("generated") / "model")


def write(bench_model: ModuleType, folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    sizes = asdict(bench_model.SHAPES["tiny"])
    return bench_model.write_llama(folder, **sizes, dtype=dtype, seed=seed)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def test_a_generated_checkpoint_loads_whole_and_its_activations_stay_in_size(model: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.arange(5, 69)[None]
    with torch.no_grad():
        output = loaded(input_ids=tokens, labels=tokens, output_hidden_states=True)
    assert output.loss < 2 * math.log(1024)
    assert all(0.3 < hidden.std() < 3 for hidden in output.hidden_states)


def test_a_generated_checkpoint_has_one_shard_per_block_and_the_size_it_says(
    model: Path, tool: Any
) -> None:
    shape = tool("bench_model").SHAPES["tiny"]
    index = json.loads((model / "model.safetensors.index.json").read_text())
    written = tensors(model)
    assert set(index["weight_map"]) == set(written)
    assert len(set(index["weight_map"].values())) == shape.blocks + 1
    total = sum(tensor.nbytes for tensor in written.values())
    assert index["metadata"]["total_size"] == total
    assert shape.block_bytes(4) + shape.rest_bytes(4) == total
    prunable = {name: one for name, one in written.items() if "_proj" in name}
    assert shape.prunable == sum(tensor.numel() for tensor in prunable.values())


def test_the_seed_decides_the_weights(model: Path, tool: Any, tmp_path: Path) -> None:
    again = tensors(write(tool("bench_model"), tmp_path / "again"))
    other = tensors(write(tool("bench_model"), tmp_path / "other", seed=1))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(again[name], tensors(model)[name])
    assert not torch.equal(other[name], again[name])


def test_the_vocabulary_must_hold_the_ids_of_the_tokenizer(tool: Any, tmp_path: Path) -> None:
    sizes = asdict(replace(tool("bench_model").SHAPES["tiny"], vocabulary=512))
    with pytest.raises(ValueError, match="the tokenizer has 1024 ids; got vocabulary=512"):
        tool("bench_model").write_llama(tmp_path / "model", **sizes, dtype="float32", seed=0)
    assert not (tmp_path / "model").exists()


def test_the_baseline_in_memory_decides_like_the_streamed_run(
    model: Path, tool: Any, tmp_path: Path
) -> None:
    baseline = tool("in_memory").run(
        model, tmp_path / "theirs", text=TEXT, nsamples=NSAMPLES, seqlen=SEQLEN, dtype="float32",
        device="cpu",
    )  # fmt: skip
    record = lowmem_gblm.prune(
        model, tmp_path / "ours", calibration=str(TEXT), nsamples=NSAMPLES, seqlen=SEQLEN,
        device="cpu",
    )  # fmt: skip
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    saved = 2 / tool("bench_model").SHAPES["tiny"].blocks
    assert record["flops"] * 10 == pytest.approx(baseline["flops"] * (12 - saved))


def test_the_baseline_imports_nothing_of_the_product() -> None:
    lines = (TOOLS / "in_memory.py").read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports
    assert not any("lowmem_gblm" in line for line in imports)


@pytest.mark.parametrize(
    ("seconds", "flops", "prune"),
    [
        ({"dense": 1, "reverse": 1, "prune": 1}, 6, {"forward": 2}),
        ({"dense": 1, "reverse": 1}, 4, None),
        ({"prune": 1}, 2, {"forward": 2}),
        ({"prune": 1}, 0, None),
    ],
)
def test_every_product_of_a_run_belongs_to_a_pass(
    tool: Any, seconds: dict[str, int], flops: int, prune: dict[str, int] | None
) -> None:
    found = tool("bench_report").products_of_passes({"seconds": seconds, "flops": flops * 10}, 10)
    assert found.get("prune") == prune
    assert sum(count for one in found.values() for count in one.values()) == flops


def test_the_rate_of_a_mixture_is_that_of_its_seconds(tool: Any) -> None:
    rates = {"forward": 4.0, "weight": 1.0}
    assert tool("bench_report").mixed_rate(rates, {"forward": 4, "weight": 1}) == 2.5


def test_sweeps_are_multiples_of_the_passes_beside_them(tool: Any) -> None:
    sweeps = {
        "dense": {"seconds": 11.0, "forward": 10.0},
        "reverse": {"seconds": 60.0, "forward": 20.0, "backward": 80.0},
        "prune": {"seconds": 49.0, "forward": 10.0},
    }
    assert tool("bench_report").plain_lines(sweeps) == [
        "in turns      1.33 × 6 forward passes in memory (dense 1.10, reverse 1.00, prune 2.45)",
        "in turns      1.09 × the same passes in memory (dense 1.10, reverse 0.75, prune 2.45)",
    ]
    assert not tool("bench_report").plain_lines({})


def test_plain_passes_are_taken_between_blocks(tool: Any, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    asked = Namespace(
        model=model, output=output, text=str(TEXT), nsamples=NSAMPLES, seqlen=SEQLEN,
        dtype="float32", device="cpu", method="gblm", activations="pruned",
    )  # fmt: skip
    forward, calls = tool("plain_passes").InTurns.forward, []

    def noting(self: Any, number: int) -> float:
        calls.append(number)
        return float(forward(self, number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool("plain_passes").InTurns, "forward", noting)
        found = tool("plain_passes").compared(asked)
    depth = tool("bench_model").SHAPES["tiny"].blocks
    assert 1 + 3 <= len(calls) <= 1 + 3 * depth
    assert set(calls) <= set(range(NSAMPLES))
    assert list(found) == ["dense", "reverse", "prune"]
    seconds = json.loads((output / "pruning.json").read_text())["seconds"]
    assert all(0 < one["seconds"] < seconds[name] for name, one in found.items())
    assert all(one["forward"] > 0 for one in found.values())
    assert [name for name, one in found.items() if "backward" in one] == ["reverse"]
    assert found["reverse"]["backward"] > 0


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_tool("bench")


@pytest.fixture(scope="module")
def figures(
    bench: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """A benchmark, each of whose measurements is taken once: its JSON, and what it prints.

    Every measurement is a process of its own: what takes it is slow.
    """
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    size = ["--shape", "tiny", "--blocks", "2", "--nsamples", "2", "--seqlen", "32"]
    taken: dict[tuple[str, ...], Any] = {}
    measured = bench.measured

    def measured_once(command: list[object]) -> Any:
        words = tuple(map(str, command))
        if words not in taken:
            taken[words] = measured(command)
        return taken[words]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(bench, "measured", measured_once)
        patch.setattr(sys, "argv", ["bench", *size, "--against", "in-memory", "--json", str(path)])
        assert bench.main() == 0
    return json.loads(path.read_text(encoding="utf-8")), printed.getvalue()


@pytest.mark.slow
def test_bench_says_what_it_measured(figures: tuple[dict[str, Any], str]) -> None:
    found, printed = figures
    (run,) = found["runs"]
    (baseline,) = found["baselines"]
    assert list(run["stages"]) == ["embed", "dense", "head", "reverse", "prune", "finish"]
    assert (run["method"], baseline["tool"], baseline["method"]) == ("gblm", "in-memory", "gblm")
    assert found["job"]["shape"]["blocks"] == 2
    assert found["rates"]["before"].keys() == found["rates"]["after"].keys()
    assert {"forward", "input", "weight", "device", "threads"} <= set(found["rates"]["before"])
    assert found["plain_passes"].keys() == {"dense", "reverse", "prune"}
    for word in ("tiny, 2 blocks, 2 × 32 tokens", "rate before", "in turns", "host peak", "in-mem"):
        assert word in printed


@pytest.mark.slow
def test_the_figures_of_bench_add_up(figures: tuple[dict[str, Any], str]) -> None:
    found, _ = figures
    (run,), job = found["runs"], found["job"]
    # The last pruned block runs forward once less.
    assert run["flops"] == (12 - 2 / 2) * job["prunable_weights"] * job["tokens"]
    flops = sum(one.get("flops", 0) for one in run["stages"].values())
    assert run["flops"] == pytest.approx(flops)
    assert run["flops_per_second"] == pytest.approx(run["flops"] / run["seconds"])
    assert run["fraction"] == pytest.approx(run["flops_per_second"] / run["rate"])
    assert run["rate"] == pytest.approx(sum(run["rates_at_its_products"]) / 2)
    shares = [one["share"] for one in run["stages"].values()]
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) <= 1.01
    assert run["wall_seconds"] > run["seconds"]


@pytest.mark.slow
def test_bench_holds_bytes_against_the_least_possible(figures: tuple[dict[str, Any], str]) -> None:
    found, _ = figures
    (run,), model_bytes = found["runs"], found["job"]["model_bytes"]
    moved = run["bytes"]
    assert moved["written_minimum"] == model_bytes
    assert model_bytes < moved["read_minimum"] < 3 * model_bytes
    assert moved["read_minimum"] <= moved["read"]
    assert moved["written_minimum"] <= moved["written"] < 1.1 * model_bytes


@pytest.mark.slow
def test_bench_gives_ours_by_theirs(figures: tuple[dict[str, Any], str]) -> None:
    found, _ = figures
    (run,), (baseline,) = found["runs"], found["baselines"]
    ratios = baseline["ratios"]
    assert run["flops"] * 10 == pytest.approx(baseline["flops"] * (12 - 2 / 2))
    assert ratios["seconds"] == pytest.approx(run["seconds"] / baseline["seconds"])
    ours, theirs = run["memory"]["host_peak_bytes"], baseline["host_peak_bytes"]
    assert ratios["host_peak_bytes"] == pytest.approx(ours / theirs)


def test_bench_refuses_a_folder_that_is_not_empty(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").touch()
    monkeypatch.setattr(sys, "argv", ["bench", "--shape", "tiny", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^bench: {tmp_path} is not empty$"):
        bench.main()
