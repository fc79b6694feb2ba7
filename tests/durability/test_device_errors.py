"""A resumed job outlives what a device does to it: no error costs it, and its bytes stay the same.

Errors are injected into a job that was stopped in every sweep, wherever a device computes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmem_gblm
from lowmem_gblm.errors import BudgetError, DeviceError, LowmemGblmError, NonFiniteError
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from support.crashes import content, stopped_at

CASES = [
    ("gblm", "pruned", ["embed", "dense", "head", "reverse", "prune"]),
    ("gblm", "dense", ["embed", "dense", "head", "reverse"]),
    ("wanda", "pruned", ["embed", "prune"]),
]
STOPS = [(*case[:2], stage) for case in CASES for stage in case[2]]
ERRORS = {
    "plain": (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceError),
    "library": (RuntimeError("cuBLAS failed with status CUBLAS_STATUS_ALLOC_FAILED"), DeviceError),
    "accelerator": (torch.AcceleratorError("unspecified launch failure"), DeviceError),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), BudgetError),
    "foreign": (RuntimeError("something else"), RuntimeError),
}
# Errors differ in what they become, stops in what is done: each error at one stop, each stop with
# one error; the other pairs are slow.
PAIRS = [
    pytest.param(
        kind, *stop, id="-".join((kind, *stop)),
        marks=() if kind == "plain" or stop == STOPS[3] else pytest.mark.slow,
    )
    for kind in ERRORS
    for stop in STOPS
]  # fmt: skip
PLACES = [
    (StreamedModel, "embed"),
    (StreamedModel, "forward_block"),
    (StreamedModel, "load_block"),
    (BlockPruner, "prune"),
    (StreamedModel, "loss_and_gradient"),
]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(llama: Path, text_file: Path) -> Run:
    def run(output: Path, **options: Any) -> dict[str, Any]:
        given = {"nsamples": 3, "seqlen": 16, "calibration": str(text_file)}
        return lowmem_gblm.prune(llama, output, **given | options)

    return run


@pytest.fixture(scope="module")
def expected(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What an undisturbed run makes, once for every method."""
    known: dict[str, dict[str, str]] = {}

    def made(**options: Any) -> dict[str, str]:
        key = str(sorted(options.items()))
        if key not in known:
            output = tmp_path_factory.mktemp("expected") / "out"
            given = {"nsamples": 3, "seqlen": 16, "calibration": str(text_file)}
            lowmem_gblm.prune(llama, output, **given | options)
            known[key] = content(output)
        return known[key]

    return made


@pytest.mark.parametrize(("kind", "method", "activations", "stage"), PAIRS)
def test_no_error_of_a_device_costs_a_job(
    kind: str,
    method: str,
    activations: str,
    stage: str,
    run: Run,
    expected: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"method": method, "activations": activations}
    output, work = tmp_path / "out", tmp_path / "out.work"
    stopped_at(run, output, stage, 1, **options)
    error, becomes = ERRORS[kind]

    def failing(*args: Any, **more: Any) -> None:
        raise error

    for place, name in PLACES:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing)
            try:
                run(output, **options)
            except becomes as caught:
                said = "\n".join([str(caught), *getattr(caught, "__notes__", [])])
                if work.exists() and list((work / "journal").iterdir()):
                    assert f"What is done is kept in {work}: lowmem-gblm resume {work}" in said
            else:
                # What is computed there was done before the job was stopped.
                break
        assert work.exists() or stage == "embed"
    if not output.exists():
        run(output, **options)
    assert content(output) == expected(**options)


@pytest.mark.parametrize(("method", "activations", "stage"), STOPS)
def test_numbers_that_turn_non_finite_cost_no_job(
    method: str,
    activations: str,
    stage: str,
    run: Run,
    expected: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"method": method, "activations": activations}
    output, work = tmp_path / "out", tmp_path / "out.work"
    stopped_at(run, output, stage, 1, **options)
    forward = StreamedModel.forward_block

    def spoiled(*args: Any, **more: Any) -> torch.Tensor:
        return forward(*args, **more) * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "forward_block", spoiled)
        with pytest.raises(NonFiniteError) as caught:
            run(output, **options)
    discard = f"to discard it, remove {work} and {output}.partial"
    assert f"lowmem-gblm resume {work} resumes it; {discard}" in str(caught.value)
    assert work.exists()
    run(output, **options)
    assert content(output) == expected(**options)


def test_an_error_of_a_device_is_not_called_an_unsupported_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **more: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.nn.Embedding, "forward", failing)
    with pytest.raises(LowmemGblmError) as caught:
        run(tmp_path / "out")
    assert str(caught.value) == ("the device has failed: CUDA error: device-side assert triggered")
    assert list(tmp_path.iterdir()) == []
