"""`--alpha auto`: the loss of a candidate is that of the model it prunes; the least is chosen."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_gblm
from lowmem_gblm.commands.calibration import Text, calibration_samples
from lowmem_gblm.commands.plan import plan_request
from lowmem_gblm.commands.request import prune_request
from lowmem_gblm.errors import NonFiniteError, RequestError
from lowmem_gblm.methods import Method, find_method, gblm
from lowmem_gblm.sweeps import search
from lowmem_gblm.sweeps.option_search import OptionSearch
from support.crashes import content
from support.tiny_models import save_tiny

SIZE: dict[str, Any] = {"nsamples": 3, "seqlen": 24}
WINDOWS = 8
STAGES = ["embed", "dense", "head", "reverse", "search", "choose", "prune", "finish", "total"]


class Case:
    """A tiny model, a text, and a run that has chosen alpha with dense activations."""

    def __init__(self, architecture: str, folder: Path, text: Path) -> None:
        self.model = save_tiny(architecture, folder / "model", blocks=2, width=32)
        self.text = text
        self.output, self.saved = folder / "auto", folder / "statistics"
        self.record = self.prune(
            self.output, alpha="auto", activations="dense", save_statistics=str(self.saved)
        )

    def prune(self, output: Path, **options: Any) -> dict[str, Any]:
        asked = {"calibration": str(self.text), **SIZE, **options}
        return lowmem_gblm.prune(self.model, output, **asked)

    def windows(self) -> Tensor:
        """The held-out windows, int64 [N, T]; `unit/commands/test_held_out.py` judges them."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        text = Text(self.text.read_text(encoding="utf-8"), "text")
        drawn = calibration_samples(
            text, lambda text: tokenizer(text)["input_ids"], seed=0, held_out=WINDOWS, **SIZE
        )
        return drawn.tokens_NT[SIZE["nsamples"] :]

    def loss(self, pruned: Path) -> float:
        """The mean loss of the windows in a pruned model, which transformers holds in memory."""
        model = AutoModelForCausalLM.from_pretrained(pruned).eval()
        with torch.no_grad():
            losses = [
                cross_entropy(model(window_T[None]).logits[0, :-1], window_T[1:])
                for window_T in self.windows()
            ]
        return float(torch.stack(losses).double().mean())


@pytest.fixture(scope="module")
def case_of(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of an architecture, made once."""
    return functools.cache(
        lambda architecture: Case(architecture, tmp_path_factory.mktemp(architecture), text_file)
    )


@pytest.fixture(params=["llama", "mixtral", "gpt2"])
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    return case_of(request.param)


@pytest.fixture
def llama_case(case_of: Callable[[str], Case]) -> Case:
    return case_of("llama")


def test_losses_are_those_of_the_models_that_the_candidates_prune(
    case: Case, tmp_path: Path
) -> None:
    found = case.record["search"]
    assert case.record["alpha"] == "auto"
    assert list(case.record["seconds"]) == STAGES
    assert found["held_out_windows"] == WINDOWS
    assert [one["alpha"] for one in found["candidates"]] == [0, 0.5, 5, 50, 500, 5000]
    best = min(found["candidates"], key=lambda one: one["loss"])
    assert found["chosen"] == {"alpha": best["alpha"]}
    # The chosen one's own model is the output; another's is that of a run with its alpha.
    other = found["candidates"][3]
    case.prune(
        tmp_path / "other", alpha=other["alpha"], activations="dense", statistics=str(case.saved)
    )
    assert case.loss(case.output) == pytest.approx(best["loss"], rel=1e-6)
    assert case.loss(tmp_path / "other") == pytest.approx(other["loss"], rel=1e-6)
    assert abs(best["loss"] - other["loss"]) > 1e-3
    assert f"alpha {best['alpha']} has the least loss of 6 candidates" in case.record["notes"][0]


def test_the_output_is_that_of_the_chosen_alpha(case: Case, tmp_path: Path) -> None:
    check_is_output_of(case.record, case.output, case.prune, tmp_path, activations="dense")


def test_so_it_is_where_activations_are_those_of_the_pruned_model(
    llama_case: Case, tmp_path: Path
) -> None:
    record = llama_case.prune(tmp_path / "auto", alpha="auto", pattern="2:4")
    check_is_output_of(record, tmp_path / "auto", llama_case.prune, tmp_path, pattern="2:4")


def check_is_output_of(
    record: dict[str, Any],
    output: Path,
    prune: Callable[..., dict[str, Any]],
    folder: Path,
    **options: Any,
) -> None:
    """A run with the alpha that was chosen gives the same bytes."""
    plain = prune(folder / "plain", **record["search"]["chosen"], **options)
    assert content(output, card=False) == content(folder / "plain", card=False)
    assert plain["search"] is None
    for part in ("tensors", "calibration_loss", "dropped_samples"):
        assert record[part] == plain[part], part
    for name, fingerprint in plain["fingerprints"].items():
        assert (record["fingerprints"][name] == fingerprint) == (name != "held_out_tokens"), name
    assert record["bytes"]["read"] == record["bytes_planned"]["read"]


def test_saved_statistics_serve_a_search(llama_case: Case, tmp_path: Path) -> None:
    """A run takes no gradients again, and with dense activations no norms."""
    for activations in ("dense", "pruned"):
        taken = lowmem_gblm.prune(
            llama_case.model, tmp_path / activations, alpha="auto", activations=activations,
            statistics=str(llama_case.saved), calibration=str(llama_case.text),
        )  # fmt: skip
        assert not {"dense", "head", "reverse"} & taken["seconds"].keys()
        assert taken["search"] == llama_case.record["search"]
        planned = taken["bytes_planned"]["read"]
        assert taken["bytes"]["read"] == pytest.approx(planned, rel=0.01)
    assert content(tmp_path / "dense") == content(llama_case.output)


def test_in_place_serves_too(
    llama_case: Case, tmp_path: Path, prune_in_place: Callable[..., dict[str, Any]]
) -> None:
    copy = shutil.copytree(llama_case.model, tmp_path / "model")
    record = prune_in_place(
        copy, alpha="auto", activations="dense", calibration=str(llama_case.text), **SIZE
    )
    assert record["search"] == llama_case.record["search"]
    shards = [load_file(path) for path in sorted(llama_case.output.glob("*.safetensors"))]
    expected = {name: tensor for shard in shards for name, tensor in shard.items()}
    found = load_file(copy / "model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_alphas_keep_the_balance_of_the_terms() -> None:
    """G of N samples is N times one gradient with l1, √N times with l2; of T tokens, 1/T to ‖X‖."""
    options = find_method("gblm").options

    def tried(nsamples: int, seqlen: int, alpha: Any = "auto", **more: Any) -> list[Any]:
        found = gblm.alphas(options(alpha=alpha, **more), nsamples, seqlen)
        assert all(one == options(alpha=one.alpha, **more) for one in found)
        return [one.alpha for one in found]

    assert tried(128, 2048, alpha=100) == []
    assert tried(128, 2048) == [0, 1, 10, 100, 1000, 10_000]
    assert tried(32, 2048) == [0, 4, 40, 400, 4000, 40_000]
    assert tried(32, 512) == [0, 1, 10, 100, 1000, 10_000]
    assert tried(64, 2048, gradient_norm="l2") == [0, 16, 160, 1600, 16_000, 160_000]


def test_a_candidate_that_is_not_finite_is_not_chosen(
    llama_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_a_window = [float("nan"), float("inf"), 3.0, 2.0, 2.0, float("nan")]
    losses = iter(of_a_window * WINDOWS)
    monkeypatch.setattr(search, "_loss", lambda run, hidden, tokens: next(losses))
    found = llama_case.prune(tmp_path / "out", alpha="auto", activations="dense")["search"]
    assert [one["loss"] for one in found["candidates"]] == [None, None, 3.0, 2.0, 2.0, None]
    assert found["chosen"] == {"alpha": 50.0}


def test_without_a_finite_loss_nothing_is_chosen() -> None:
    with pytest.raises(NonFiniteError, match="not finite in any of the 2 models to choose among"):
        _ = OptionSearch(["one", "other"], losses=[None, None]).chosen


def test_a_text_without_room_for_windows_is_refused(llama_case: Case, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(llama_case.text.read_text()[:150])
    sentence = r"beside the calibration samples .*short.txt has \d windows of 24 tokens, and 8 are"
    with pytest.raises(RequestError, match=sentence):
        llama_case.prune(tmp_path / "out", alpha="auto", calibration=str(tmp_path / "short.txt"))
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("changes", [{"candidates": lambda options, *size: [options] * 9}, {}])
def test_a_method_that_cannot_be_searched_is_named(
    changes: dict[str, Any], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = changes or {"candidates": lambda options, *size: [options], "updates_weights": True}
    method: Method = replace(find_method("wanda"), **changes)
    monkeypatch.setattr("lowmem_gblm.commands.prune.scope.find_method", lambda name: method)
    with pytest.raises(RequestError, match="the method wanda lets a run choose among"):
        plan_request(prune_request(str(llama), method="wanda", seqlen=16))


def test_nothing_is_held_out_of_calibration_in_memory(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(RequestError, match="chosen by windows held out of a text: name a file or"):
        lowmem_gblm.prune(model, tmp_path / "out", calibration=["a text " * 99], alpha="auto")
