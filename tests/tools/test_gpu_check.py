"""`tools/gpu_check`, on a CPU and at a small scale: it runs to its end, and prints one object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check"


def test_every_check_finds_something() -> None:
    options = "--device cpu --shape tiny --blocks 2 --nsamples 2 --seqlen 32 --scale 0.001"
    done = subprocess.run(
        [sys.executable, str(TOOL), *options.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device"] == "cpu"
    assert found["same_bytes_twice"] == {"wanda": True, "gblm": True, "sparsegpt": True}
    assert found["quantization"] == {"nf4": "works", "int8": "works"}
    assert found["run"]["memory"]["host_peak_bytes"] > 0
    assert set(found["run"]["milliseconds_per_sample_and_block"]) == {"dense", "reverse", "prune"}
    assert all(found["rates"].values())
    assert all(found["selection_seconds"].values())
