"""One block and its read-ahead: counted in live parameters, and as the system counts memory."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands import scoring
from lowmem_gblm.model import block_loader
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.sweeps.batches import Row
from support.forks import run_forked
from support.tiny_models import save_tiny


class Residents:
    """Watches how many buffers for decoder blocks are alive, and how many live parameters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most_buffers = 0
        self.most = 0
        self.trace: list[str] = []
        buffers: list[weakref.ref[torch.Tensor]] = []
        allocate, load = block_loader.empty_on_host, StreamedModel.load_block

        def watching_allocation(*args: object) -> torch.Tensor:
            buffer = allocate(*args)
            buffers.append(weakref.ref(buffer))
            alive = sum(one() is not None for one in buffers)
            self.most_buffers = max(self.most_buffers, alive)
            return buffer

        def watching_load(streamed: StreamedModel, index: int, tensors: dict, **options) -> None:
            self.trace.append(str(index))
            load(streamed, index, tensors, **options)
            blocks = map(streamed.block, range(streamed.depth))
            live = [block for block in blocks if not all(p.is_meta for p in block.parameters())]
            self.most = max(self.most, len(live))

        monkeypatch.setattr(block_loader, "empty_on_host", watching_allocation)
        monkeypatch.setattr(StreamedModel, "load_block", watching_load)


@pytest.mark.parametrize(
    ("method", "activations", "order"),
    [
        ("gblm", "pruned", "0,1,2,3,4,4,3,2,1,0,0,1,2,3,4"),
        ("gblm", "dense", "0,1,2,3,4,4,3,2,1,0"),
        ("gradient", "pruned", "0,1,2,3,4,4,3,2,1,0"),
        ("wanda", "pruned", "0,1,2,3,4"),
        ("sparsegpt", "dense", "0,1,2,3,4"),
        ("magnitude", "pruned", "0,1,2,3,4"),
    ],
)
def test_never_more_than_one_block_and_the_next_are_alive(
    method: str, activations: str, order: str, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = save_tiny("llama", tmp_path / "model", blocks=5)
    residents = Residents(monkeypatch)
    lowmem_gblm.prune(
        model, tmp_path / "out", method=method, activations=activations, nsamples=2, seqlen=32,
        calibration=str(text_file),
    )  # fmt: skip
    assert ",".join(residents.trace) == order
    assert residents.most == 1
    assert residents.most_buffers == 2


@pytest.mark.parametrize("method", ["gblm", pytest.param("wanda", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_depth(method: str, text_file: Path, tmp_path: Path) -> None:
    """Peaks of host memory, of 4 blocks and of 40, each in a process with nothing else.

    Of 36 more blocks the weights are 44 MB, and the hidden states before them 12 MB: 5 % are 20 MB.
    All sweeps of `wanda` are sweeps of `gblm`.
    """
    size = ["--nsamples", "4", "--seqlen", "128", "--calibration", str(text_file)]
    models = [
        save_tiny("llama", tmp_path / f"{blocks}", blocks=blocks, width=160) for blocks in (4, 40)
    ]
    peaks = []
    for model in models:
        command = ["prune", str(model), f"{model}-pruned", "--json", *size, "--method", method]
        done = run_forked(main, command)
        peaks.append(json.loads(done.out)["memory"]["host_peak_bytes"])
    shallow, deep = peaks
    assert deep <= 1.05 * shallow, f"{deep / shallow:.3f} times as much"


def score(model: str, count: int, dtype: str) -> None:
    """Score so many rows, as `eval --tasks` does; print the peak of host memory.

    Rows have 20 to 64 tokens and 1 to 8 labels.
    """
    draw, resources = np.random.default_rng(0), Resources(dtype=dtype)
    rows = []
    for _ in range(count):
        length, labels = draw.integers(20, 65), draw.integers(1, 9)
        tokens, wanted = draw.integers(0, 60, length), draw.integers(0, 60, labels)
        rows.append(Row.of(tokens, wanted, first=length - labels))
    with scoring.model_to_score(model, resources) as opened:
        print(scoring.score(opened, resources, rows, packed=True).memory["host_peak_bytes"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_an_evaluation_grows_with_neither_depth_nor_questions(
    dtype: str, tmp_path: Path
) -> None:
    """Each in a process with nothing else: few questions, many, and few of a deeper model.

    Batches have 1680 tokens, so that their hidden states are as large as those of real models in
    float32. The tokens of 3,700 more questions take 4 MB; of 18 more blocks the weights are 22 MB.
    In bfloat16, oneDNN keeps a megabyte for each number of rows that it multiplies.
    """
    models = [
        str(save_tiny("llama", tmp_path / f"{blocks}", blocks=blocks, width=160))
        for blocks in (2, 20)
    ]
    asked = [(models[0], 300, dtype), (models[0], 4000, dtype), (models[1], 300, dtype)]
    few, many, deep = (int(run_forked(score, *one).out) for one in asked)
    assert many <= 1.05 * few, f"{many / few:.3f} times as much"
    assert deep <= 1.05 * few, f"{deep / few:.3f} times as much"
