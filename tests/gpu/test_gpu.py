"""On a real GPU: what the pretended one cannot tell. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowmem_gblm
from lowmem_gblm.methods.masks import bisected, keep_largest
from lowmem_gblm.model.bnb import check_usable
from lowmem_gblm.runtime.accelerator import fuses_attention
from support.crashes import content

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU"),
]
SIZE = {"nsamples": 8, "seqlen": 64}


@pytest.fixture
def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, 0)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gradient", "gblm", "sparsegpt"])
def test_a_gpu_decides_nearly_as_a_cpu_and_the_same_twice(
    method: str, device: torch.device, tmp_path: Path
) -> None:
    outputs = [tmp_path / name for name in ("cpu", "first", "second")]
    for output, name in zip(outputs, ("cpu", str(device), str(device)), strict=True):
        lowmem_gblm.prune("demo", output, method=method, device=name, **SIZE)
        lowmem_gblm.verify(output, against="demo")
    assert content(outputs[1]) == content(outputs[2])


def test_the_peak_is_within_the_plan(device: torch.device, tmp_path: Path) -> None:
    record = lowmem_gblm.prune("demo", tmp_path / "out", device=str(device), **SIZE)
    assert 0 < record["memory"]["gpu_peak_bytes"] <= record["memory"]["gpu_planned_bytes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [2, 8])
def test_attention_holds_its_matrices_only_where_that_is_planned(
    dtype: torch.dtype, key_heads: int, device: torch.device
) -> None:
    query, key = (
        torch.rand(1, heads, 2048, 64, dtype=dtype, device=device, requires_grad=True)
        for heads in (8, key_heads)
    )
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    shares = key_heads < 8
    torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=shares
    ).sum().backward()
    taken = torch.accelerator.max_memory_allocated(device) - before
    if fuses_attention(device, dtype, 8, key_heads, 64):
        assert taken < 8 * 2048 * 2048 * dtype.itemsize


def test_selection_on_a_gpu_is_that_of_a_cpu(device: torch.device) -> None:
    score = torch.rand(64, 512).mul(50).round()
    there = score.to(device)
    assert torch.equal(keep_largest(there, 200).cpu(), keep_largest(score, 200))
    one = score.reshape(1, -1)
    expected = one.kthvalue(9000, dim=1, keepdim=True).values
    assert torch.equal(bisected(one.to(device), 9000).cpu(), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_works_there(kind: str, device: torch.device) -> None:
    check_usable(device, kind)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_products_of_semi_structured_matrices_are_those_of_dense_ones(tmp_path: Path) -> None:
    lowmem_gblm.prune("demo", tmp_path / "out", method="magnitude", pattern="2:4")
    shard = load_file(tmp_path / "out" / "model-00001-of-00005.safetensors", device="cuda")
    weight = shard["model.layers.0.mlp.down_proj.weight"].half()
    inputs = torch.randn(64, weight.shape[1], device="cuda", dtype=torch.half)
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    torch.testing.assert_close(
        torch.nn.functional.linear(inputs, sparse), inputs @ weight.T, atol=1e-2, rtol=1e-2
    )
