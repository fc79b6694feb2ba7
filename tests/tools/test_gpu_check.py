"""`tools/gpu_check`, on a CPU and at a small scale: it runs to its end, and prints one object."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check"


def test_every_check_finds_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--device cpu --shape tiny --blocks 2 --nsamples 2 --seqlen 32 --scale 0.001"
    monkeypatch.setattr(sys, "argv", [str(TOOL), *options.split()])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(TOOL.parent)
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(TOOL), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu"
    assert found["same_bytes_twice"] == {"wanda": True, "gblm": True, "sparsegpt": True}
    assert found["quantization"] == {"nf4": "works", "int8": "works"}
    assert found["run"]["memory"]["host_peak_bytes"] > 0
    assert set(found["run"]["milliseconds_per_sample_and_block"]) == {"dense", "reverse", "prune"}
    assert all(found["rates"].values())
    assert all(found["selection_seconds"].values())
