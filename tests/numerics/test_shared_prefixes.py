"""Answers that share a context are scored as if each were alone; models that cannot are noticed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_gblm.commands import scoring
from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.sweeps import prefix_check
from lowmem_gblm.sweeps.batches import Row, Score
from support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

# See 16 tokens in some blocks.
WINDOWED = ("mistral", "gemma2")
Scores = dict[Row, Score]


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[SharedPrefix]:
    """The layout of every line that passes through a block from now on."""
    seen: list[SharedPrefix] = []
    forward = StreamedModel.forward_block

    def noting(
        self: StreamedModel, index: int, hidden: Any, tap: Any = None, layout: Any = None
    ) -> Any:
        seen.extend(filter(None, [layout]))
        return forward(self, index, hidden, tap, layout)

    monkeypatch.setattr(StreamedModel, "forward_block", noting)
    return seen


def rows_of(contexts: Sequence[int]) -> list[Row]:
    """Four answers of 3 to 6 tokens to questions of these lengths."""
    draw, rows = np.random.default_rng(0), []
    for length in contexts:
        context = draw.integers(3, 300, length)
        for answer in (draw.integers(3, 300, size) for size in (3, 4, 5, 6)):
            tokens = [*context, *answer]
            rows.append(Row.of(tokens[:-1], answer, first=length - 1))
    return rows


def score(
    model: Path, rows: list[Row], folder: Path, *, packed: bool = True, dtype: Any = "float32"
) -> Scores:
    resources = Resources(work_dir=folder, dtype=dtype)
    with scoring.model_to_score(str(model), resources) as opened:
        found = scoring.score(opened, resources, rows, packed=packed).scores
    assert not list(folder.iterdir())
    return found


def assert_close(found: Scores, expected: Scores) -> None:
    assert found.keys() == expected.keys()
    for row, one in found.items():
        assert one.log_probability == pytest.approx(expected[row].log_probability, abs=2e-5)
        assert one.is_likeliest == expected[row].is_likeliest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_contexts_score_as_the_model_in_memory_does(
    models: Callable[[str], Path], architecture: str, tmp_path: Path, layouts: list[SharedPrefix]
) -> None:
    # Two of the second length, for a batch of two lines; windows take one short context.
    rows = rows_of([9, 10] if architecture in WINDOWED else [9, 40, 41, 100])
    found = score(models(architecture), rows, tmp_path)
    assert {layout.prefix for layout in layouts} == (
        {8} if architecture in WINDOWED else {8, 40, 96}
    )
    whole = tiny_model(architecture)
    for row, one in found.items():
        tokens, labels = (
            torch.from_numpy(np.frombuffer(each, np.int32).astype(np.int64))
            for each in (row.tokens, row.labels)
        )
        with torch.no_grad():
            log_probabilities = whole(tokens[None]).logits[0, row.first :].log_softmax(dim=1)
        expected = log_probabilities.gather(1, labels[:, None]).sum()
        assert one.log_probability == pytest.approx(float(expected), abs=1e-4)
        assert one.is_likeliest == bool((log_probabilities.argmax(dim=1) == labels).all())


def test_longer_sequences_than_a_window_share_nothing(
    models: Callable[[str], Path], tmp_path: Path, layouts: list[SharedPrefix],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, "lowmem_gblm"):
        score(models("mistral"), rows_of([40]), tmp_path)
    assert not layouts
    assert not caplog.messages


def test_nothing_is_shared_in_bfloat16_on_a_cpu(
    models: Callable[[str], Path], tmp_path: Path, layouts: list[SharedPrefix]
) -> None:
    score(models("llama"), rows_of([40]), tmp_path, dtype="bfloat16")
    assert not layouts


def ignore_mask(self: SharedPrefix, dtype: Any, device: Any) -> dict[str, Any]:
    """As a model whose blocks see all that is before them."""
    return {"position_ids": arguments(self, dtype, device)["position_ids"]}


def ignore_positions(self: SharedPrefix, dtype: Any, device: Any) -> dict[str, Any]:
    """As a model that counts positions by itself."""
    return {"attention_mask": arguments(self, dtype, device)["attention_mask"]}


def other_shape(self: SharedPrefix, dtype: Any, device: Any) -> dict[str, Any]:
    """As a model whose code fails with such a mask."""
    given = arguments(self, dtype, device)
    return given | {"attention_mask": given["attention_mask"][:, :, :3]}


arguments = SharedPrefix.arguments


@pytest.mark.parametrize("given", [ignore_mask, ignore_positions, other_shape])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_models_that_cannot_share_a_prefix_are_found_out(
    models: Callable[[str], Path], architecture: str, given: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model, rows = models(architecture), rows_of([40, 41])
    expected = score(model, rows, tmp_path, packed=False)
    monkeypatch.setattr(SharedPrefix, "arguments", given)
    with caplog.at_level(logging.INFO, "lowmem_gblm"):
        assert_close(score(model, rows, tmp_path), expected)
    (message,) = caplog.messages
    assert message.startswith("note: every answer is computed with its own context: ")


def test_a_block_in_the_middle_that_cannot_share_is_found_out(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    layouts: list[SharedPrefix], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Blocks that are done by then are computed again."""
    model, rows = models("llama"), rows_of([40, 41])
    expected = score(model, rows, tmp_path, packed=False)
    forward = StreamedModel.forward_block

    def blind(
        self: StreamedModel, index: int, hidden: Any, tap: Any = None, layout: Any = None
    ) -> Any:
        out = forward(self, index, hidden, tap, layout)
        return out * 1.001 if index == 1 and layout is not None else out

    monkeypatch.setattr(StreamedModel, "forward_block", blind)
    with caplog.at_level(logging.INFO, "lowmem_gblm"):
        assert_close(score(model, rows, tmp_path), expected)
    assert layouts
    assert caplog.messages == [
        "note: every answer is computed with its own context: decoder block 1 does not compute "
        "sequences with a shared prefix as it computes them apart"
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_rounding_to_bfloat16_is_no_difference(
    models: Callable[[str], Path], architecture: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, layouts: list[SharedPrefix], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(scoring, "compiles_every_shape", lambda *given: False)
    with caplog.at_level(logging.INFO, "lowmem_gblm"):
        score(models(architecture), rows_of([40, 41, 100]), tmp_path, dtype="bfloat16")
    assert layouts
    assert not caplog.messages


LAYOUT = SharedPrefix(prefix=2, ending=8, endings=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_wrong_tokens_are_a_difference_unless_they_are_routed(dtype: torch.dtype) -> None:
    """A window that is a little shorter than the sequence cuts off what the last tokens see."""
    expected = torch.randn(1, 10, 64, dtype=dtype)
    found = expected.clone()
    found[0, -2:] *= 1.1
    assert not prefix_check._differ(expected.clone(), expected, LAYOUT)
    assert prefix_check._differ(found, expected, LAYOUT)
    assert not prefix_check._differ(found, expected, LAYOUT, routed=True)
    found[0, 4:] *= 1.1
    assert prefix_check._differ(found, expected, LAYOUT, routed=True)


def test_only_the_shared_sequence_may_not_be_non_finite() -> None:
    expected = torch.randn(1, 10, 64)
    found = expected.clone()
    found[0, 5] = torch.nan
    assert prefix_check._differ(found, expected, LAYOUT)
    assert not prefix_check._differ(found, found.clone(), LAYOUT)


def test_models_without_a_stated_window_are_found_out_by_their_last_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-Neo has windows under another name, and counts them by places in a line."""
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, window_size=14,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "work").mkdir()
    rows = rows_of([9, 9])
    expected = score(tmp_path / "model", rows, tmp_path / "work", packed=False)
    with caplog.at_level(logging.INFO, "lowmem_gblm"):
        assert_close(score(tmp_path / "model", rows, tmp_path / "work"), expected)
    (message,) = caplog.messages
    assert "decoder block 1 does not" in message
