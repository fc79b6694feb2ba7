"""Two threads compute the same bytes in every process; the other tests have one thread."""

from __future__ import annotations

from pathlib import Path

import torch

from lowmem_gblm.cli.main import main
from support.forks import run_forked
from support.tiny_models import save_tiny


def prune_in_two_threads(command: list[str]) -> int:
    """Be the command line in a process of two threads; return its exit code."""
    torch.set_num_threads(2)
    return main(command)


def test_two_processes_of_two_threads_prune_to_the_same_bytes(
    text_file: Path, tmp_path: Path
) -> None:
    """Widths at which torch shares out products, sums and functions among its threads."""
    model = save_tiny("llama", tmp_path / "model", blocks=2, width=256)
    given = ["--calibration", str(text_file), "--nsamples", "4", "--seqlen", "128"]
    shards = []
    for output in (tmp_path / "first", tmp_path / "second"):
        done = run_forked(prune_in_two_threads, ["prune", str(model), str(output), *given])
        assert done.code == 0, done.err
        shards.append({file.name: file.read_bytes() for file in output.glob("*.safetensors")})
    assert shards[0]
    assert shards[0] == shards[1]
