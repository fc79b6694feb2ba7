"""The reference itself: against the published code's results, and against what lies on disk."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.reference import (
    document_windows,
    input_statistics,
    keep_groups,
    keep_matrix,
    keep_rows,
    losses_and_gradients,
    perplexity,
    prunable,
    prune,
    recorded_inputs,
    removals,
    score_of,
    sparsegpt,
    text_windows,
)
from support.tiny_models import ARCHITECTURES, sample_text, save_tiny, tiny_model, tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "real/models/stories260K"
needs_shared = pytest.mark.skipif(not STORIES.is_dir(), reason="no shared real models and texts")

# The share of keep decisions that must agree, by method. The published magnitude and SparseGPT
# remove one weight more per comparison group.
AGREEMENT = {
    "magnitude": 0.999,
    "wanda": 0.9995,
    "gradient": 0.9995,
    "gblm": 0.9995,
    "sparsegpt": 0.99,
}
CASES = (
    "magnitude/0.5",
    "wanda/2:4",
    "gblm/l1/0.5",
    "sparsegpt/2:4",
    pytest.param("gradient/l2/0.5", marks=pytest.mark.slow),
    pytest.param("wanda/0.5", marks=pytest.mark.slow),
    pytest.param("gblm/l1/2:4", marks=pytest.mark.slow),
    pytest.param("gblm/l2/0.5", marks=pytest.mark.slow),
    pytest.param("sparsegpt/0.5", marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def stories_text(name: str) -> torch.Tensor:
    text = (SHARED / f"real/text/tinystories_{name}.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    return tokenizer(text, return_tensors="pt")["input_ids"][0]


@cache
def published() -> tuple[dict, dict]:
    results = json.loads((SHARED / "reference/stories260K.json").read_text())["results"]
    return results, numpy.load(SHARED / "reference/stories260K_zeros.npz")


def options_of(case: str) -> dict:
    method, *norm, pattern = case.split("/")
    amount = {"sparsity": pattern}
    if ":" in pattern:
        amount = {"n_of_m": tuple(int(part) for part in pattern.split(":"))}
    return {"method": method, "norm": norm[0] if norm else "l1"} | amount


def tiny_samples(nsamples: int = 2, seqlen: int = 40) -> torch.Tensor:
    token_ids = torch.tensor(tiny_tokenizer()(sample_text(2000))["input_ids"])
    return text_windows(token_ids, nsamples, seqlen, seed=0)


@needs_shared
def test_dense_perplexity_is_the_published_one():
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    measured = perplexity(model, stories_text("evaluation"), 256, windows=100)
    assert measured == pytest.approx(published()[0]["dense/0"]["perplexity"], rel=1e-4)


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_decisions_and_perplexity_are_the_published_ones(case):
    results, zeros = published()
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    options = options_of(case)
    samples = text_windows(stories_text("calibration"), 32, 256, seed=0)
    keep = prune(model, samples, **options)
    same = [
        numpy.unpackbits(zeros[f"{case}|{name}"])[: kept.numel()] == ~kept.flatten().numpy()
        for name, kept in keep.items()
    ]
    assert numpy.concatenate(same).mean() >= AGREEMENT[options["method"]]
    measured = perplexity(model, stories_text("evaluation"), 256, windows=100)
    assert measured == pytest.approx(results[case]["perplexity"], rel=0.01)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_views_are_those_on_disk(architecture, sharded, tmp_path):
    folder = save_tiny(architecture, tmp_path, sharded=sharded)
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert (len(shards) > 1) == sharded
    disk = {name: tensor for shard in shards for name, tensor in shard.items()}
    matrices = prunable(AutoModelForCausalLM.from_pretrained(folder))
    in_blocks = {
        name
        for name, tensor in disk.items()
        if tensor.dim() > 1 and (".layers." in name or ".h." in name)
    }
    routers = {name for name in in_blocks if name.endswith("block_sparse_moe.gate.weight")}
    assert {matrix.name for matrix in matrices} == in_blocks - routers
    for matrix in matrices:
        stored = disk[matrix.name].T if architecture == "gpt2" else disk[matrix.name]
        assert torch.equal(matrix.view(), stored)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokenizer_loads_offline_and_begins_texts(architecture, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(architecture, tmp_path))
    text = sample_text(300, seed=3) + " Ünïcode"
    token_ids = tokenizer(text)["input_ids"]
    assert token_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(token_ids[1:]) == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "gradient", "gblm", "sparsegpt"])
def test_pruning_writes_zeros_into_the_live_model(method, architecture):
    model = tiny_model(architecture)
    dense = {matrix.name: matrix.view().clone() for matrix in prunable(model)}
    keep = prune(model, tiny_samples(), method=method, n_of_m=(2, 4))
    for matrix in prunable(model):
        weight, kept = matrix.view(), keep[matrix.name]
        assert (kept.reshape(-1, 4).sum(1) == 2).all()
        assert (weight[~kept] == 0).all()
        assert not weight[~kept].signbit().any()
        if method != "sparsegpt":
            assert torch.equal(weight[kept], dense[matrix.name][kept])


def test_recording_leaves_the_experts_numbers_alone():
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    sample = tiny_samples()
    expected = model(input_ids=sample).logits
    seen = []
    with recorded_inputs(model, [0, 1, 2], lambda name, rows: seen.append(name)):
        assert torch.equal(model(input_ids=sample).logits, expected)
    assert {matrix.name for matrix in prunable(model)} == set(seen)
    seen.clear()
    assert torch.equal(model(input_ids=sample).logits, expected)
    assert not seen


def test_gradients_add_up_over_samples():
    model = tiny_model("gpt2")
    samples = tiny_samples(nsamples=3)
    losses, total = losses_and_gradients(model, samples, "l1")
    parts = [losses_and_gradients(model, sample[None], "l1") for sample in samples]
    assert losses == [part[0][0] for part in parts]
    for name, magnitude in total.items():
        assert torch.equal(magnitude, parts[0][1][name] + parts[1][1][name] + parts[2][1][name])


def test_activations_differ_from_the_second_block_on():
    samples = tiny_samples()
    options = {"method": "wanda", "sparsity": "0.5"}
    pruned = prune(tiny_model("llama"), samples, **options, activations="pruned")
    dense = prune(tiny_model("llama"), samples, **options, activations="dense")
    same = {name: torch.equal(pruned[name], dense[name]) for name in pruned}
    assert all(equal for name, equal in same.items() if ".layers.0." in name)
    assert not all(same.values())


def test_input_norm_is_averaged_over_samples_and_summed_over_tokens():
    model = tiny_model("llama")
    samples = tiny_samples()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    norms = input_statistics(model, samples, [0], "norm")
    assert not norms["model.layers.0.self_attn.q_proj.weight"].any()
    rows = []
    with recorded_inputs(model, [0], lambda name, x: rows.append((name, x.detach()))):
        model(input_ids=samples)
    name, seen = next(item for item in rows if "gate_proj" in item[0])
    torch.testing.assert_close(norms[name], (seen.square().sum(0) / 2).sqrt())


def test_counts_are_exact_and_ties_go_from_the_left():
    assert removals(100, "0.29") == 29
    ones = torch.ones(2, 4)
    assert keep_rows(ones, 1).tolist() == [[False, True, True, True]] * 2
    assert keep_matrix(ones, "0.625").tolist() == [[False] * 4, [False, True, True, True]]
    assert keep_groups(ones, (1, 2)).tolist() == [[False, True, False, True]] * 2
    with pytest.raises(ValueError, match="3 does not divide the width 4"):
        keep_groups(ones, (2, 3))


def test_rows_without_a_score_fall_back_to_magnitude():
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    gradient = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert score_of("gradient", weight, None, gradient, 100.0).tolist() == [[1, 2], [3, 0]]


def test_sparsegpt_prunes_an_unseen_matrix_by_magnitude():
    weight = torch.randn(6, 144, generator=torch.Generator().manual_seed(0))
    updated, keep = sparsegpt(weight, torch.zeros(144, 144), sparsity="0.5", n_of_m=None)
    assert torch.equal(keep[:, :128], keep_matrix(weight[:, :128].abs(), "0.5"))
    assert torch.equal(updated, weight.masked_fill(~keep, 0))


def test_sparsegpt_removes_dead_columns_and_loses_less_than_masking():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 160, generator=generator)
    inputs = torch.randn(400, 160, generator=generator).cumsum(1)
    inputs[:, 7] = 0
    updated, keep = sparsegpt(weight, inputs.T @ inputs, sparsity="0.5", n_of_m=None)
    assert not updated[:, 7].any()
    assert keep.sum() == keep.numel() // 2

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        return (inputs @ (candidate - weight).T).square().sum()

    assert loss(updated) < 0.5 * loss(weight.masked_fill(~keep, 0))


def test_documents_shorter_than_a_window_are_drawn_again():
    documents = [[1] * 8, list(range(10, 19)), list(range(20, 40))]
    windows = document_windows(documents, nsamples=20, seqlen=8, seed=0)
    assert windows.shape == (20, 8)
    # A document of seqlen + 1 tokens has one start only: the last one is never drawn.
    assert {int(window[0]) for window in windows} <= {10, *range(20, 32)}
