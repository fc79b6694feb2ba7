"""The head: logits of few shapes, without a copy of its matrix, and what the likeliest token is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_gblm.model import streamed_model
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.model.streamed_model import StreamedModel, _are_likeliest
from lowmem_gblm.planning.resources import Resources


class Products(TorchDispatchMode):
    """Notes the rows of every product of two matrices, and products of stacks of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.of_stacks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.rows.append(len(args[0]))
        self.of_stacks += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def streamed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> StreamedModel:
    """A model that computes the logits of 100 positions at once."""
    opened = open_model(str(llama), Resources())
    opened.streamed.fill(opened.checkpoint)
    monkeypatch.setattr(streamed_model, "HEAD_LOGITS", 100 * opened.streamed.config.vocab_size)
    return opened.streamed


def test_logits_are_products_of_matrices_of_few_shapes(streamed: StreamedModel) -> None:
    """Where a slice has strides of more, torch multiplies stacks, and copies the head for that."""
    tokens_BT = torch.arange(200).reshape(2, 100)
    hidden, products = streamed.embed(tokens_BT), Products()
    every, labels = torch.arange(200), torch.arange(200) % 7
    expected, _ = streamed.token_losses(hidden, tokens_BT, every, labels)
    with products:
        for count in range(1, 201):
            losses, likeliest = streamed.token_losses(
                hidden, tokens_BT, every[:count], labels[:count]
            )
            assert losses.shape == likeliest.shape == (count,)
            torch.testing.assert_close(losses, expected[:count])
    assert not products.of_stacks
    assert max(products.rows) == 100
    assert len(set(products.rows)) < 40


def test_the_loss_of_a_sample_multiplies_matrices_too(streamed: StreamedModel) -> None:
    tokens = torch.arange(120)[None]
    with Products() as products:
        streamed.loss_and_gradient(streamed.embed(tokens), tokens)
    assert not products.of_stacks
    assert products.rows.count(100) >= 2


def test_the_likeliest_token_is_the_first_of_the_largest_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (300, 6), generator=draw).bfloat16()
    labels = torch.randint(0, 6, (300,), generator=draw)
    found = _are_likeliest(labels, logits)
    assert torch.equal(found, logits.argmax(dim=1) == labels)
    assert 20 < found.sum() < 150
