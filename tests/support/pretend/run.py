"""Runs of the package on the pretended device and on the CPU, in a process of their own.

Reads a JSON list from stdin: jobs, each with keywords of `prune`, or with those of `evaluate`, or
with a number of questions whose answers are scored.
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
                    if "questions" in job:
                        record = scored_answers(**job, device=device)
                        entry[device] = hash_of_text(repr(record["scores"]))
                    elif "windows" in job:
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


def scored_answers(model: str, questions: int, device: str) -> dict[str, Any]:
    """Scores and memory of four answers to each question, which share its context."""
    import numpy as np

    from lowmem_gblm.commands.scoring import model_to_score, score
    from lowmem_gblm.planning.resources import Resources
    from lowmem_gblm.sweeps.batches import Row

    draw, resources, rows = np.random.default_rng(0), Resources(device=device), []
    for context in draw.integers(3, 300, (questions, 24)):
        for answer in draw.integers(3, 300, (4, 5)):
            rows.append(Row.of([*context, *answer], answer, first=23))
    with model_to_score(model, resources) as opened:
        found = score(opened, resources, rows, packed=True)
    return {"scores": [found.scores[row] for row in rows], "memory": found.memory}


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
