"""Runs of models of any size on the pretended device, without numbers and without files.

Reads one JSON object from stdin: `config`, the content of config.json; `gpu_bytes`, the memory of
the card; `nsamples`; `write_bytes_s`, how fast the disk writes; `options`, further keywords of
`prune`. Prints the memory of the device by pass: as planned, as taken by tensors, as reserved.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from support.pretend import device as pretend
from support.pretend.run import follow_stages


class HollowStore:
    """A work folder that keeps shapes, and takes as long to write as a disk does."""

    def __init__(self, write_bytes_s: float) -> None:
        self._write_bytes_s = write_bytes_s
        self._kept: dict[tuple[str, Any], tuple[torch.Size, torch.dtype]] = {}
        self._growing: set[str] = set()

    def __enter__(self) -> HollowStore:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is on the disk."""

    def write(self, name: str, item: Any, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cpu"
        time.sleep(tensor.nbytes / self._write_bytes_s)
        self._kept[name, item] = tensor.shape, tensor.dtype
        self._growing.add(name)

    def hold(self, name: str, item: Any, tensor: torch.Tensor) -> None:
        self._kept[name, item] = tensor.shape, tensor.dtype

    def read(self, name: str, item: Any, *where: Any) -> torch.Tensor:
        shape, dtype = self._kept[name, item]
        return where[0](shape, dtype=dtype) if where else torch.empty(shape, dtype=dtype)

    def holds(self, name: str, item: Any) -> bool:
        return (name, item) in self._kept

    def written(self) -> list[str]:
        return list(self._growing)

    def publish(self, names: Iterable[str]) -> dict[str, Any]:
        self._growing -= set(names)
        return {}

    def adopt(self, tables: Any) -> None:
        """A run that begins has nothing to adopt."""

    def drop(self, name: str) -> None:
        for key in [key for key in self._kept if key[0] == name]:
            del self._kept[key]
        self._growing.discard(name)


class HollowWriter:
    """An output that is not written."""

    shards: ClassVar[dict[str, Any]] = {}
    bytes_written = 0

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def finished(self, blocks: Iterable[int]) -> dict[str, Any]:
        return {}

    def ignore(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is written."""

    settle = committed = write_rest = close = withdraw = publish = ignore


def main() -> None:
    asked = json.load(sys.stdin)
    pretend.install()
    pretend.WORLD.hollow = True
    pretend.Module.total = asked["gpu_bytes"]
    from lowmem_gblm.runtime.progress import Progress

    follow_stages(Progress)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(asked["config"]))
        found = simulate(Path(folder), asked)
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    # Threads of autograd may still hold what an error has left.
    os._exit(0)


def simulate(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from lowmem_gblm.commands.calibration import Samples
    from lowmem_gblm.commands.prune import pipeline, session
    from lowmem_gblm.commands.request import prune_request
    from lowmem_gblm.errors import BudgetError
    from lowmem_gblm.methods import sparsegpt
    from lowmem_gblm.model import open_model
    from lowmem_gblm.model.from_config import describe
    from lowmem_gblm.storage.checkpoint.reader import Checkpoint

    seen: dict[str, Any] = {}

    def described(path: Path) -> Checkpoint:
        found = describe(path)
        found.on_disk = True
        return found

    def read(self: Checkpoint, name: str, into: Any = None) -> torch.Tensor:
        entry = self.tensors[name]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8) if into is None else into
        return buffer.view(entry.dtype).view(entry.shape)

    def samples(scope: Any) -> Samples:
        count = scope.request.nsamples if scope.work.schedule.needs_samples else 0
        return Samples(torch.randint(0, 1000, (count, scope.work.seqlen)))

    original = pipeline.prepare

    def prepare(*args: Any) -> Any:
        seen["plan"] = original(*args)
        return seen["plan"]

    patches = [
        mock.patch.object(open_model, "Checkpoint", described),
        mock.patch.object(Checkpoint, "read", read),
        mock.patch.object(Checkpoint, "read_finite", read),
        mock.patch.object(Checkpoint, "first_bytes", return_value=b""),
        mock.patch.object(pipeline, "draw_samples", samples),
        mock.patch.object(pipeline, "prepare", prepare),
        mock.patch.object(pipeline, "run_record", return_value={}),
        mock.patch.object(pipeline, "model_card", return_value=""),
        mock.patch.object(session, "check_usable"),
        # Thousands of small operations, whose memory is that of the first.
        mock.patch.object(sparsegpt, "_sweep_columns", lambda weight, *more: weight.clone()),
        mock.patch.object(session, "_writer", return_value=HollowWriter()),
        mock.patch.object(session, "open_store", return_value=HollowStore(asked["write_bytes_s"])),
    ]
    request = prune_request(
        str(folder), folder / "out", device=pretend.NAME, nsamples=asked["nsamples"],
        cpu_memory=1 << 40, disk=1 << 50, **asked["options"],
    )  # fmt: skip
    with_all(patches)
    error = None
    try:
        pipeline.prune(request)
    except (BudgetError, torch.OutOfMemoryError) as failed:
        error = f"{type(failed).__name__}: {str(failed)[:300]}"
    plan = seen["plan"].plan if "plan" in seen else None
    return {
        "error": error,
        "planned": {} if plan is None else {one.name: one.gpu_bytes for one in plan.footprints},
        "parts": {} if plan is None else {one.name: one.gpu for one in plan.footprints},
        "context_bytes": pretend.CONTEXT_BYTES,
        "choices": None if plan is None else str(plan.choices),
        "taken": {stage: two[0] for stage, two in pretend.WORLD.peaks.items()},
        "reserved": {stage: two[1] for stage, two in pretend.WORLD.peaks.items()},
        "holders": {stage: holders(found) for stage, found in pretend.WORLD.largest.items()},
        "faults": pretend.WORLD.faults[:20],
    }


def holders(found: list[tuple[int, str]]) -> dict[str, int]:
    """The lines that have made most of what is taken at the fullest moment of a pass."""
    made: Counter[str] = Counter()
    for size, line in found:
        made[line] += size
    return dict(made.most_common(8))


def with_all(patches: Iterable[Any]) -> None:
    for patch in patches:
        patch.start()


if __name__ == "__main__":
    main()
