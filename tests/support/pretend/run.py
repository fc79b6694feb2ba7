"""Runs of the package on the pretended device and on the CPU, in a process of their own.

Reads a JSON list from stdin: jobs, each with keywords of `prune`, or with those of `evaluate`.
Prints an entry for every job: hashes of the results on both devices, faults, waits, peaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.pretend import device as pretend


def main() -> None:
    jobs = json.load(sys.stdin)
    pretend.install()
    import lowmem_gblm
    from lowmem_gblm.runtime.progress import Progress

    follow_stages(Progress)
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs):
            entry: dict[str, Any] = {}
            for device in ("cpu", pretend.NAME):
                pretend.WORLD.forget()
                output = Path(folder) / f"{number}-{device}"
                try:
                    if "windows" in job:
                        record = lowmem_gblm.evaluate(**job | {"device": device})
                        entry[device] = hash_of_text(repr(record["perplexity"]))
                    else:
                        record = lowmem_gblm.prune(output=output, **job | {"device": device})
                        entry[device] = hash_of(output)
                except Exception as error:
                    import traceback

                    traceback.print_exc()
                    entry[device] = f"{type(error).__name__}: {error}"
                    continue
                finally:
                    shutil.rmtree(output, ignore_errors=True)
            entry |= pretend.WORLD.report()
            entry["planned_bytes"] = record["memory"]["gpu_planned_bytes"]
            entry["peak_bytes"] = record["memory"]["gpu_peak_bytes"]
            found.append(entry)
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    # Threads of autograd may still hold what an error has left.
    os._exit(0)


def hash_of(folder: Path) -> str:
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def follow_stages(progress: Any) -> None:
    """Let the device know in which stage it is used."""
    original = progress.stage

    @contextmanager
    def stage(self: Any, name: str) -> Any:
        pretend.WORLD.stage = name
        with original(self, name):
            yield
        pretend.WORLD.stage = ""

    progress.stage = stage


if __name__ == "__main__":
    main()
