"""Runs on the pretended device from which one synchronization is left out on purpose.

Reads `model` and the names of `controls`; prints for each what was noticed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.pretend import device as pretend


def main() -> None:
    asked = json.load(sys.stdin)
    pretend.install()
    torch.set_num_threads(1)
    json.dump({name: run(name, asked["model"]) for name in asked["controls"]}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


def run(name: str, model: str) -> dict[str, Any]:
    import lowmem_gblm

    pretend.WORLD.forget()
    error = None
    with tempfile.TemporaryDirectory() as folder, left_out()[name]:
        try:
            lowmem_gblm.prune(
                model, Path(folder) / "out", nsamples=3, seqlen=32, device=pretend.NAME
            )
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"[:500]
    return {"faults": pretend.WORLD.faults[:5], "error": error}


def left_out() -> dict[str, Any]:
    from lowmem_gblm.runtime import accelerator
    from lowmem_gblm.runtime.accelerator import CopyStream
    from lowmem_gblm.sweeps import block_pruner

    def on_two_devices(decision: Any, target: torch.Tensor) -> None:
        target.masked_fill_(decision.keep.cpu().logical_not(), 0)

    return {
        "nothing": nullcontext(),
        "copies to the device": unsynchronized(CopyStream, "to_device"),
        "copies to the host": unsynchronized(CopyStream, "to_host"),
        "the event of a computed tensor": mock.patch.object(
            pretend.Stream, "wait_event", return_value=None
        ),
        "the use by another stream": untaken(accelerator),
        "pinned memory": mock.patch.object(
            accelerator,
            "empty_on_host",
            lambda shape, dtype, device: torch.empty(shape, dtype=dtype),
        ),
        "a matrix on the device": mock.patch.object(block_pruner, "_apply", on_two_devices),
    }


def forget(tensors: object) -> None:
    """Not a mock, which would keep what it is called with."""


@contextmanager
def untaken(accelerator: Any) -> Iterator[None]:
    """Have no stream take over what another one has copied, where nothing else waits for it."""
    copied = accelerator.CopyStream.to_host

    def slowly(self: Any, tensor: torch.Tensor, ready: Any) -> torch.Tensor:
        time.sleep(0.05)
        found: torch.Tensor = copied(self, tensor, ready)
        return found

    with (
        mock.patch.object(accelerator, "take_over", forget),
        mock.patch.object(accelerator.CopyStream, "to_host", slowly),
    ):
        yield


@contextmanager
def unsynchronized(owner: Any, name: str) -> Iterator[None]:
    """Have a method return before its stream has done the copies."""
    original: Callable[..., Any] = getattr(owner, name)

    def hasty(self: Any, *arguments: Any) -> Any:
        if self._stream is None:
            return original(self, *arguments)
        with mock.patch.object(self._stream, "synchronize"):
            return original(self, *arguments)

    with mock.patch.object(owner, name, hasty):
        yield


if __name__ == "__main__":
    main()
