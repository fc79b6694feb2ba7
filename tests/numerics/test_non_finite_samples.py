"""Samples that turn non-finite: left out exactly, counted and named; too many stop the job."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowmem_gblm
from lowmem_gblm.commands.calibration import Samples
from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.sweeps import reverse
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.sample_set import SampleSet
from lowmem_gblm.sweeps.statistics.finite import all_finite, are_finite
from lowmem_gblm.sweeps.statistics.gradient import Gradient
from support.crashes import content, stopped_at
from support.tiny_models import save_tiny

COUNT, SICK, BLOCKS = 12, 4, 3
SIZE = {"nsamples": COUNT, "seqlen": 16}
# Where a sample turns non-finite before any statistics were gathered: what arrives there, the
# method, and what the record says.
BEFORE_STATISTICS = [
    ("embedded-0", "gblm", "dense", 0),
    ("dense-1", "gblm", "dense", 1),
    ("dense-1", "gradient", "dense", 1),
    (f"dense-{BLOCKS}", "gblm", "head", None),
    (f"loss-gradient-{BLOCKS}", "gblm", "reverse", BLOCKS - 1),
    ("embedded-0", "wanda", "prune", 0),
    ("embedded-0", "sparsegpt", "prune", 0),
]
Poison = Callable[..., None]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("sick") / "model", blocks=BLOCKS, width=32)


@pytest.fixture
def run(model: Path, text_file: Path) -> Run:
    def run(output: Path, **options: Any) -> dict[str, Any]:
        asked = {"calibration": str(text_file), "max_shard_size": 1} | SIZE | options
        return lowmem_gblm.prune(model, output, **asked)

    return run


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Makes what arrives under a name infinite for some samples."""
    arriving = Offload.prefetch

    def poison(name: str, numbers: Sequence[int] = (SICK,)) -> None:
        def poisoned(
            self: Offload, names: Sequence[str], order: Sequence[int]
        ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
            for n, tensors in arriving(self, names, order):
                hit = str(names[-1]) == name and n in numbers
                yield n, (*tensors[:-1], tensors[-1] * torch.inf) if hit else tensors

        monkeypatch.setattr(Offload, "prefetch", poisoned)

    return poison


def without_the_sick(run: Run, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any):
    """The same where the sample was never drawn."""
    from lowmem_gblm.commands.prune import scope

    drawn = scope.calibration_samples

    def fewer(*args: Any, **more: Any) -> Samples:
        samples_NT = drawn(*args, **more).tokens_NT
        return Samples(torch.cat([samples_NT[:SICK], samples_NT[SICK + 1 :]]))

    with monkeypatch.context() as patch:
        patch.setattr(scope, "calibration_samples", fewer)
        return run(output, **options)


def shard(folder: Path, block: int) -> str:
    path = folder / f"model-{block + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_sample_that_gradients_were_saved_without_is_left_out_where_they_are_taken(
    run: Run, poison: Poison, tmp_path: Path
) -> None:
    poison("dense-1")
    saved = tmp_path / "saved"
    run(tmp_path / "saving", save_statistics=saved)
    expected = run(tmp_path / "expected", sparsity=0.6)
    taking = {"statistics": saved, "sparsity": 0.6}
    record = run(tmp_path / "taken", **taking)
    assert record["dropped_samples"] == expected["dropped_samples"] != []
    left_out = f"1 of {COUNT} calibration samples turned non-finite and are not in {saved.name}"
    assert left_out in record["notes"]
    stopped_at(run, tmp_path / "resumed", "prune", 1, **taking)
    resumed = run(tmp_path / "resumed", **taking)
    assert resumed["dropped_samples"] == expected["dropped_samples"]
    for name in ("taken", "resumed"):
        assert content(tmp_path / name, card=False) == content(tmp_path / "expected", card=False), (
            name
        )


@pytest.mark.parametrize("activations", ["pruned", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "method", "stage", "block"), BEFORE_STATISTICS)
def test_before_any_statistics_it_is_as_if_the_sample_had_not_been_drawn(
    name: str,
    method: str,
    stage: str,
    block: int | None,
    activations: str,
    run: Run,
    poison: Poison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"method": method, "activations": activations}
    expected = without_the_sick(run, tmp_path / "expected", monkeypatch, **options)
    poison(name)
    record = run(tmp_path / "out", **options)
    assert content(tmp_path / "out", card=False) == content(tmp_path / "expected", card=False)
    assert record["dropped_samples"] == [{"sample": SICK, "pass": stage, "block": block}]
    if stage != "reverse":
        assert record["calibration_loss"] == expected["calibration_loss"]
    where = "" if block is None else f"block {block} of "
    assert (
        f"1 of {COUNT} calibration samples turned non-finite and were left out: it began with "
        f"calibration sample 4 in {where}the {stage} pass"
    ) in record["notes"]


@pytest.mark.parametrize(
    ("name", "method", "stage", "others"),
    [("loss-gradient-2", "gradient", "reverse", [2]), ("pruned-1", "wanda", "prune", [0])],
)
def test_what_was_done_before_stays_and_the_block_itself_is_without_the_sample(
    name: str,
    method: str,
    stage: str,
    others: list[int],
    run: Run,
    poison: Poison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"method": method, "activations": "dense"}
    run(tmp_path / "plain", **options)
    without_the_sick(run, tmp_path / "without", monkeypatch, **options)
    poison(name)
    record = run(tmp_path / "out", **options)
    assert record["dropped_samples"] == [{"sample": SICK, "pass": stage, "block": 1}]
    for block in range(BLOCKS):
        expected = tmp_path / ("plain" if block in others else "without")
        assert shard(tmp_path / "out", block) == shard(expected, block), block
    assert shard(tmp_path / "plain", 1) != shard(tmp_path / "without", 1)


def test_the_boundaries_of_the_pruned_model_are_looked_at_too(
    run: Run, poison: Poison, tmp_path: Path
) -> None:
    run(tmp_path / "plain", method="wanda")
    poison("pruned-1")
    record = run(tmp_path / "out", method="wanda")
    assert record["dropped_samples"] == [{"sample": SICK, "pass": "prune", "block": 1}]
    assert shard(tmp_path / "out", 0) == shard(tmp_path / "plain", 0)


@pytest.mark.parametrize("stage", ["dense", "head", "reverse", "prune"])
@pytest.mark.parametrize(
    "name", [f"loss-gradient-{BLOCKS}", pytest.param("dense-1", marks=pytest.mark.slow)]
)
def test_a_resumed_job_knows_who_was_dropped(
    name: str, stage: str, run: Run, poison: Poison, tmp_path: Path
) -> None:
    poison(name)
    expected = run(tmp_path / "expected")
    stopped_at(run, tmp_path / "out", stage, 3 if stage != "head" else COUNT - 1)
    record = run(tmp_path / "out")
    assert content(tmp_path / "out", card=False) == content(tmp_path / "expected", card=False)
    assert record["dropped_samples"] == expected["dropped_samples"] != []
    assert record["calibration_loss"] == expected["calibration_loss"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("dense-1", "block 1 of the dense pass"),
        (f"dense-{BLOCKS}", "the head pass"),
        ("loss-gradient-2", "block 1 of the reverse pass"),
        ("pruned-2", "block 2 of the prune pass"),
    ],
)
def test_more_than_a_tenth_stops_the_job(
    name: str, where: str, run: Run, poison: Poison, tmp_path: Path
) -> None:
    poison(name, (3, 7))
    message = (
        rf"^2 of 12 calibration samples have turned non-finite, at most 10% may: it began with "
        rf"calibration sample 3 in {where}\. Look at the weights there, or try --dtype bfloat16"
    )
    with pytest.raises(NonFiniteError, match=message) as caught:
        run(tmp_path / "out")
    assert caught.value.exit_code == 6
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.work"}


def test_of_few_samples_none_may_be_sick(run: Run, poison: Poison, tmp_path: Path) -> None:
    poison("dense-1")
    with pytest.raises(NonFiniteError, match="1 of 9 calibration samples have turned non-finite"):
        run(tmp_path / "out", nsamples=9)


def test_a_sick_window_of_an_evaluation_is_named(
    model: Path, text_file: Path, poison: Poison, tmp_path: Path
) -> None:
    poison("dense-1", (2,))
    asked = {"text": str(text_file), "seqlen": 16, "windows": 5, "work_dir": tmp_path}
    message = "1 of 5 windows have turned non-finite, at most 0% may: it began with window 2 in blo"
    with pytest.raises(NonFiniteError, match=message):
        lowmem_gblm.evaluate(model, **asked)


def test_where_nothing_is_sick_nothing_is_dropped(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "out")["dropped_samples"] == []


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are multiplied with 1024, as in float16; in float32 this changes no bit."""
    monkeypatch.setattr("lowmem_gblm.commands.prune.scope.loss_scale", lambda dtype, seqlen: 1024.0)


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Gradients of one sample overflow in block 1, down to a power of two; lists its exponents."""
    backward = reverse._Trials._backward

    def overflow(until: int) -> list[int]:
        tried: list[int] = []
        run_block = reverse._BlockBackward._run

        def watched(self: Any, order: Any, gradient: Gradient, *args: Any, **more: Any) -> Any:
            def one(trials: Any, block: Any, hidden: Tensor, arriving: Tensor, tap: Any):
                leaving = backward(trials, block, hidden, arriving, tap)
                number = current[0]
                if number == SICK and block.index == 1:
                    tried.append(self.run.samples.exponent(number))
                    return leaving * torch.inf if tried[-1] < until else leaving
                return leaving

            monkeypatch.setattr(reverse._Trials, "_backward", one)
            return run_block(self, order, gradient, *args, **more)

        current = [0]
        arriving = Offload.prefetch

        def counted(self: Offload, *args: Any) -> Iterator[Any]:
            for n, tensors in arriving(self, *args):
                current[0] = n
                yield n, tensors

        monkeypatch.setattr(Offload, "prefetch", counted)
        monkeypatch.setattr(reverse._BlockBackward, "_run", watched)
        return tried

    return overflow


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.usefixtures("scaled")
def test_an_overflow_is_tried_again_with_less_and_changes_no_bit(
    norm: str,
    activations: str,
    run: Run,
    overflowing: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    options = {"gradient_norm": norm, "activations": activations}
    run(tmp_path / "expected", **options)
    tried = overflowing(8)
    record = run(tmp_path / "out", **options)
    assert content(tmp_path / "out", card=False) == content(tmp_path / "expected", card=False)
    assert record["dropped_samples"] == []
    assert tried == [0, 4, 8]


@pytest.mark.usefixtures("scaled")
def test_a_resumed_job_knows_what_was_scaled_with_less(
    run: Run, overflowing: Callable[[int], list[int]], tmp_path: Path
) -> None:
    run(tmp_path / "expected")
    tried = overflowing(8)
    stopped_at(run, tmp_path / "out", "reverse", 2)
    run(tmp_path / "out")
    assert content(tmp_path / "out", card=False) == content(tmp_path / "expected", card=False)
    assert tried == [0, 4, 8]


@pytest.mark.usefixtures("scaled")
def test_after_three_tries_a_sample_is_sick(
    run: Run, overflowing: Callable[[int], list[int]], tmp_path: Path
) -> None:
    tried = overflowing(99)
    record = run(tmp_path / "out")
    assert tried == [0, 4, 8, 12]
    assert record["dropped_samples"] == [{"sample": SICK, "pass": "reverse", "block": 1}]


@pytest.mark.usefixtures("scaled")
def test_the_head_tries_again_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_gblm.model.streamed_model import StreamedModel

    run(tmp_path / "expected")
    whole, scales = StreamedModel.loss_and_gradient, []

    def overflowing(self: StreamedModel, hidden: Tensor, tokens: Tensor, scale: float):
        loss, gradient = whole(self, hidden, tokens, scale)
        scales.append(scale)
        return loss, gradient * torch.inf if scale > 8 else gradient

    monkeypatch.setattr(StreamedModel, "loss_and_gradient", overflowing)
    record = run(tmp_path / "out", nsamples=COUNT)
    assert content(tmp_path / "out", card=False) == content(tmp_path / "expected", card=False)
    assert scales == [1024.0, 64.0, 4.0] * COUNT
    assert record["dropped_samples"] == []


@pytest.mark.parametrize("memory", [None, "sliced"])
def test_a_gradient_that_overflows_though_what_goes_on_does_not_is_found(
    memory: str | None,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in float16, where the sum over tokens is larger than any of its parts."""
    if memory:
        cut = "lowmem_gblm.sweeps.reverse.slices_within"
        monkeypatch.setattr(cut, lambda sizes, room: [[n] for n in range(len(sizes))])
    expected = without_the_sick(run, tmp_path / "expected", monkeypatch, method="gradient")
    magnitude, arriving, current = Gradient._magnitude, Offload.prefetch, [("", 0)]

    def counted(self: Offload, names: Sequence[str], *args: Any) -> Iterator[Any]:
        for n, tensors in arriving(self, names, *args):
            current[0] = str(names[-1]), n
            yield n, tensors

    def overflowing(self: Gradient, gradient: Tensor) -> Tensor:
        found = magnitude(self, gradient)
        return found * torch.inf if current[0] == (f"loss-gradient-{BLOCKS}", SICK) else found

    monkeypatch.setattr(Offload, "prefetch", counted)
    monkeypatch.setattr(Gradient, "_magnitude", overflowing)
    record = run(tmp_path / "out", method="gradient")
    assert content(tmp_path / "out", card=False) == content(tmp_path / "expected", card=False)
    dropped = {"sample": SICK, "pass": "reverse", "block": BLOCKS - 1}
    assert record["dropped_samples"] == [dropped]
    assert expected["dropped_samples"] == []


def test_gradients_that_are_all_zero_are_noted(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = save_tiny("llama", tmp_path / "model", blocks=2, width=32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = {"calibration": str(text_file), "nsamples": 2, "seqlen": 16, "method": "gradient"}
    record = lowmem_gblm.prune(folder, tmp_path / "out", **options)
    assert [note for note in record["notes"] if "zero" in note] == [
        f"model.layers.1.mlp.{name}.weight: all of its gradients are zero"
        for name in ("gate_proj", "up_proj")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sick", [torch.nan, torch.inf, -torch.inf])
def test_one_number_is_enough(dtype: torch.dtype, sick: float) -> None:
    tensor = torch.arange(12.0).to(dtype).view(3, 4)
    assert bool(all_finite(tensor))
    assert are_finite([tensor, tensor])
    assert are_finite([])
    tensor[1, 2] = sick
    assert not bool(all_finite(tensor))
    assert not are_finite([torch.ones(1), tensor])


def test_samples_tell_the_journal_what_is_new() -> None:
    samples = SampleSet(40, scaled=True)
    samples.drop([3], "dense", 1)
    assert samples.reduce_scale(5)
    news = samples.journal_entry()
    assert news == {
        "dropped_samples": [{"sample": 3, "pass": "dense", "block": 1}],
        "weakened_samples": [[5, 4]],
    }
    assert samples.journal_entry() == {"dropped_samples": [], "weakened_samples": []}
    assert samples.reduce_scale(5)
    other = SampleSet(40, scaled=True)
    other.restore(news)
    other.restore(samples.journal_entry())
    assert (other.active, other.exponent(5)) == (samples.active, 8)
    assert other.journal_entry() == {"dropped_samples": [], "weakened_samples": []}


def test_without_a_scale_there_is_nothing_to_make_smaller() -> None:
    assert not SampleSet(40).reduce_scale(5)
