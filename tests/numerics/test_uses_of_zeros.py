"""What others do with zeros: torch's own form of 2:4 matrices takes those of an output exactly.

The form is made by torch on any device; only its products need a GPU (`gpu/test_gpu.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import lowmem_gblm
from support.tiny_models import save_tiny


def there_and_back(weight: Tensor) -> Tensor:
    """Half of the numbers, and 2 bits for the place of each."""
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.numel() * 2 == weight.numel()
    return sparse_semi_structured_to_dense_cutlass(values, places)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_matrix_at_2_of_4_is_semi_structured(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", dtype=dtype, blocks=1, width=64)
    for name, goal in (("out", {"pattern": "2:4"}), ("other", {"sparsity": 0.5})):
        lowmem_gblm.prune(model, tmp_path / name, method="magnitude", max_shard_size=1, **goal)
    matrices = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    others = load_file(tmp_path / "other" / "model-00001-of-00002.safetensors")
    pruned = [name for name, weight in matrices.items() if weight.dim() == 2]
    assert len(pruned) == 7
    for name in pruned:
        assert torch.equal(there_and_back(matrices[name]), matrices[name])
        # As many zeros elsewhere are not of that form: numbers would be lost.
        assert not torch.equal(there_and_back(others[name]), others[name])
