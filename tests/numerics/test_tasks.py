"""Language tasks: a streamed model scores what the harness's own `hf` model scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lowmem_gblm
from lowmem_gblm.commands.harness import SweepingLM
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from support.tasks import REAL, write_made_up_tasks, write_real_tasks
from support.tiny_models import ARCHITECTURES, save_tiny, tiny_model

MADE_UP = ("endings", "last_words", "stories")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_made_up_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real-tasks")
    write_real_tasks(shared, folder)
    return folder


@cache
def requests_of(folder: Path, names: Sequence[str], shots: int) -> list[Any]:
    """The requests of ten questions of each task."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = []
    for task in manager.load(list(names))["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=10)
        found += task.instances
    return found


def by_harness(
    model: Path, folder: Path, names: Sequence[str], monkeypatch: pytest.MonkeyPatch, **more: Any
) -> dict[str, Any]:
    # What the machine has installed takes seconds to list.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    theirs = HFLM(str(model), device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        theirs, tasks=list(names), task_manager=manager, log_samples=False, **more
    )


def assert_same_answers(model: Path, requests: list[Any]) -> None:
    """Answers of both models to requests of one type."""
    streamed = SweepingLM(str(model))
    theirs = HFLM(str(model), device="cpu", dtype="float32", batch_size=8)
    kind = requests[0].request_type
    found = getattr(streamed, kind)(requests)
    expected = getattr(theirs, kind)(requests, disable_tqdm=True)
    if kind == "loglikelihood":
        assert [one[1] for one in found] == [one[1] for one in expected]
        found, expected = ([one[0] for one in each] for each in (found, expected))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_every_log_likelihood_is_that_of_the_harness(
    models: Callable[[str], Path], architecture: str, shots: int, made_up: Path
) -> None:
    for name in MADE_UP:
        assert_same_answers(models(architecture), requests_of(made_up, (name,), shots))


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "gemma2"))],
)
def test_real_tasks_are_scored_as_by_the_harness(
    models: Callable[[str], Path], architecture: str, shots: int, real: Path
) -> None:
    assert_same_answers(models(architecture), requests_of(real, tuple(REAL), shots))


@pytest.mark.parametrize("shots", [None, 2])
def test_results_are_those_of_the_harness(
    llama: Path, made_up: Path, shots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"num_fewshot": shots, "limit": 10}
    found = lowmem_gblm.evaluate(llama, tasks=MADE_UP, include_path=made_up, **asked)
    expected = by_harness(llama, made_up, MADE_UP, monkeypatch, **asked)
    assert found["results"].keys() == expected["results"].keys()
    for task, values in expected["results"].items():
        assert found["results"][task] == pytest.approx(values, abs=1e-5)
        # To the last digit.
        for name in ("acc,none", "acc_norm,none", "acc_stderr,none"):
            assert found["results"][task].get(name) == values.get(name)
    for name in ("versions", "n-shot", "n-samples", "higher_is_better", "configs"):
        assert found[name] == expected[name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_is_scored_as_its_rows_are_alone(
    models: Callable[[str], Path], architecture: str
) -> None:
    """Of the model in memory, row by row and without padding."""
    folder, whole = models(architecture), tiny_model(architecture)
    lengths = (40, 33, 3)
    rows = [torch.randint(3, 300, (length,)) for length in lengths]
    tokens_BT = torch.zeros(3, 40, dtype=torch.int32)
    for line, row in zip(tokens_BT, rows, strict=True):
        line[: len(row)] = row
    opened = open_model(str(folder), Resources())
    opened.streamed.fill(opened.checkpoint)
    hidden = opened.streamed.embed(tokens_BT)
    for index, names in enumerate(opened.streamed.block_tensors):
        opened.streamed.load_block(index, {name: opened.checkpoint.read(name) for name in names})
        with torch.no_grad():
            hidden = opened.streamed.forward_block(index, hidden)
    places = torch.cat([40 * line + torch.arange(len(row) - 1) for line, row in enumerate(rows)])
    labels = torch.cat([row[1:] for row in rows])
    losses, likeliest = opened.streamed.token_losses(hidden, tokens_BT, places, labels)
    for row, loss in zip(rows, losses.split([len(row) - 1 for row in rows]), strict=True):
        with torch.no_grad():
            logits = whole(row[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert likeliest.shape == losses.shape


def test_the_weights_are_read_once_for_a_text_and_tasks_of_all_types(
    llama: Path, made_up: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes: Counter[str] = Counter()
    read = Checkpoint.read

    def counting(checkpoint: Checkpoint, name: str, into: Any = None) -> torch.Tensor:
        read_bytes[name] += checkpoint.tensors[name].nbytes
        return read(checkpoint, name, into)

    monkeypatch.setattr(Checkpoint, "read", counting)
    found = lowmem_gblm.evaluate(
        llama, text=str(text_file), seqlen=64, tasks=MADE_UP, include_path=made_up
    )
    checkpoint = Checkpoint(llama)
    blocks = StreamedModel(checkpoint, torch.device("cpu"), torch.float32).block_tensors
    once = {name: checkpoint.tensors[name].nbytes for names in blocks for name in names}
    assert {name: read_bytes[name] for name in once} == once
    assert found["perplexity"] > 1
    assert set(found["results"]) == set(MADE_UP)


def test_perplexity_is_the_same_beside_tasks(llama: Path, made_up: Path, text_file: Path) -> None:
    asked: dict[str, Any] = {"text": str(text_file), "seqlen": 64, "windows": 5}
    alone = lowmem_gblm.evaluate(llama, **asked)
    beside = lowmem_gblm.evaluate(llama, tasks="endings", include_path=made_up, **asked)
    assert beside["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert beside["windows"] == alone["windows"]


def test_max_length_is_what_the_model_reads_at_most(llama: Path, made_up: Path) -> None:
    requests = requests_of(made_up, ("endings",), 0)
    streamed = SweepingLM(str(llama), max_length=20)
    theirs = HFLM(str(llama), device="cpu", dtype="float32", max_length=20)
    found, expected = streamed.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)


def test_the_harness_finds_the_model_by_its_name(
    llama: Path, made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get_model("lowmem-gblm") is SweepingLM
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    found = lm_eval.simple_evaluate(
        "lowmem-gblm", model_args=f"pretrained={llama},cpu_memory=8GiB,dtype=float32",
        tasks=["endings"], batch_size=1, log_samples=False,
        task_manager=TaskManager(include_path=str(made_up), include_defaults=False),
    )  # fmt: skip
    ours = lowmem_gblm.evaluate(llama, tasks=["endings"], include_path=made_up)
    assert found["results"]["endings"] == pytest.approx(ours["results"]["endings"])


def test_chat_templates_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", blocks=1, width=16)
    (model / "chat_template.jinja").write_text(
        "{% for one in messages %}<{{one.role}}>{{one.content}}{% endfor %}"
    )
    chat = [{"role": "user", "content": "a"}]
    streamed, theirs = SweepingLM(str(model)), HFLM(str(model), device="cpu")
    assert streamed.apply_chat_template(chat) == theirs.apply_chat_template(chat) == "<user>a"
    assert streamed.chat_template(True) == theirs.chat_template(True)
    assert streamed.tokenizer_name == theirs.tokenizer_name
