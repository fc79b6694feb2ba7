"""One block and its read-ahead: counted in live parameters, and as the system counts memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from tiny import save_tiny

import lowmem_gblm
from lowmem_gblm.disk.checkpoint import Checkpoint
from lowmem_gblm.model.skeleton import Skeleton


class Residents:
    """Counts the tensors of decoder blocks that were read and are still alive, in blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_block: int) -> None:
        self.most = 0.0
        self.trace: list[str] = []
        self._alive: weakref.WeakSet[object] = weakref.WeakSet()
        self._per_block = per_block
        read, load = Checkpoint.read, Skeleton.load_block

        def counting_read(checkpoint: Checkpoint, name: str):
            tensor = read(checkpoint, name)
            if ".layers." in name:
                # The storage outlives views of it: what counts is whether its memory is held.
                self._alive.add(tensor.untyped_storage())
                self.most = max(self.most, len(self._alive) / self._per_block)
            return tensor

        def tracing_load(skeleton: Skeleton, index: int, tensors: dict) -> None:
            self.trace.append(str(index))
            load(skeleton, index, tensors)

        monkeypatch.setattr(Checkpoint, "read", counting_read)
        monkeypatch.setattr(Skeleton, "load_block", tracing_load)


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
    names = [name for name in Checkpoint(model).tensors if ".layers.0." in name]
    residents = Residents(monkeypatch, per_block=len(names))
    lowmem_gblm.prune(
        model, tmp_path / "out", method=method, activations=activations, nsamples=2, seqlen=32,
        calibration=str(text_file),
    )  # fmt: skip
    assert ",".join(residents.trace) == order
    assert 1 < residents.most <= 2


MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
import lowmem_gblm
model, output, text = sys.argv[1:]
record = lowmem_gblm.prune(model, output, nsamples=8, seqlen=128, calibration=text)
print(json.dumps(record["memory"]))
"""


def peak_bytes(blocks: int, folder: Path, text: Path) -> int:
    """Peak of a `gblm` run in a process of its own on a model of width 256."""
    model = save_tiny("llama", folder / f"model{blocks}", blocks=blocks, width=256)
    command = [sys.executable, "-c", MEASURE, str(model), str(folder / f"out{blocks}"), str(text)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)["host_peak_bytes"]


def test_memory_does_not_grow_with_depth(text_file: Path, tmp_path: Path) -> None:
    gc.collect()
    shallow, deep = (peak_bytes(blocks, tmp_path, text_file) for blocks in (6, 48))
    assert deep <= 1.05 * shallow, f"{deep / shallow:.3f} times as much"
