#!/usr/bin/env python3
"""GBLM pruning with the complete model in memory: what streaming is measured against.

The algorithm of the authors' published code (GBLM-Pruner, arXiv 2311.04902), as it runs with enough
memory: full back-propagation, one calibration sample at a time, into float32
sums of the gradients' magnitudes on the host; then block by block the norms of its inputs in the
model pruned so far, scores, zeros, and on with the pruned block. It imports nothing of lowmem_gblm.

With P weights in the matrices of the blocks and D tokens: 6PD FLOPs for the gradients, 4PD for
pruning.

Usage:
    python tools/in_memory.py MODEL OUTPUT --text FILE [--nsamples N] [--seqlen T] [--dtype NAME]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SPARSITY = 0.5
ALPHA = 100.0
SEED = 0
DTYPES = ("float32", "bfloat16")


@dataclass
class Clock:
    """Seconds of every stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run the body as the named stage."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


class FirstBlock(nn.Module):
    """A stub in the place of the blocks that keeps the arguments of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_1TD: Tensor, **arguments: Any) -> Tensor:
        self.hidden.append(hidden_1TD)
        self.arguments = arguments
        return hidden_1TD


def calibration_samples(model: Path, text: Path, nsamples: int, seqlen: int) -> Tensor:
    """Return windows of the text, int64 [N, 1, T], at the places that the authors' code draws."""
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"))["input_ids"]
    draw = random.Random(SEED)
    starts = [draw.randint(0, len(tokens) - seqlen - 1) for _ in range(nsamples)]
    return torch.tensor([[tokens[start : start + seqlen]] for start in starts])


def matrices(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the modules of a block that are pruned, by name."""
    return {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear)}


def gradient_magnitudes(model: PreTrainedModel, samples: Tensor) -> list[dict[str, Tensor]]:
    """Return `sum_n |g_n|` of every matrix of every block, float32 [out, in] on the host."""
    model.requires_grad_(True)
    blocks = [matrices(block) for block in model.model.layers]
    sums = [
        {name: torch.zeros(one.weight.shape) for name, one in block.items()} for block in blocks
    ]
    for sample_1T in samples.to(model.device):
        model(input_ids=sample_1T, labels=sample_1T, use_cache=False).loss.backward()
        for block, totals in zip(blocks, sums, strict=True):
            for name, one in block.items():
                totals[name] += one.weight.grad.abs().to("cpu", torch.float32)
        model.zero_grad()
    model.requires_grad_(False)
    return sums


@torch.no_grad()
def prune(model: PreTrainedModel, samples: Tensor, gradients: Sequence[dict[str, Tensor]]) -> None:
    """Prune the model in place, first block to last.

    Args:
        model: The dense model.
        samples: int64 [N, 1, T].
        gradients: Gradient magnitudes, by block and name.
    """
    blocks = model.model.layers
    first = FirstBlock()
    model.model.layers = nn.ModuleList([first])
    for sample_1T in samples.to(model.device):
        model.model(input_ids=sample_1T, use_cache=False)
    model.model.layers = blocks
    hidden = first.hidden
    for block, totals in zip(blocks, gradients, strict=True):
        norms = input_norms(block, hidden, first.arguments)
        for name, one in matrices(block).items():
            prune_matrix(one.weight, norms[name], totals[name].to(model.device))
        hidden = [block(one, **first.arguments) for one in hidden]


def input_norms(
    block: nn.Module, hidden: Sequence[Tensor], arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Return norms of all matrices' inputs, float32 [in]: sum over tokens, mean over samples."""
    squares: dict[str, Tensor] = {}
    hooks = []
    for name, one in matrices(block).items():
        squares[name] = torch.zeros(one.in_features, device=one.weight.device)

        def add(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            squares[name] += given[0].flatten(0, -2).float().square().sum(dim=0)

        hooks.append(one.register_forward_pre_hook(add))
    for one_sample in hidden:
        block(one_sample, **arguments)
    for hook in hooks:
        hook.remove()
    return {name: (total / len(hidden)).sqrt() for name, total in squares.items()}


def prune_matrix(weight_OI: Tensor, norm_I: Tensor, gradient_OI: Tensor) -> None:
    """Zero the smallest scores `|W| (‖X‖ + α G)` of every row, in place."""
    size_OI = weight_OI.float().abs()
    score_OI = size_OI * norm_I + ALPHA * (size_OI * gradient_OI)
    order_OI = score_OI.sort(dim=1, stable=True).indices
    weight_OI.scatter_(1, order_OI[:, : int(weight_OI.shape[1] * SPARSITY)], 0)


def host_peak_bytes() -> int:
    """Return the largest resident set of this process, as Linux counts it."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, "Linux names VmHWM in the status of a process"
    return int(match[1]) * 1024


def run(
    model_folder: Path,
    output: Path,
    *,
    text: Path,
    nsamples: int,
    seqlen: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Prune a checkpoint into a new one.

    Args:
        model_folder: The dense checkpoint, of a Llama.
        output: Folder for the pruned checkpoint.
        text: UTF-8 file for the calibration samples.
        nsamples: Number of samples.
        seqlen: Tokens of a sample.
        dtype: Dtype of weights and computation.
        device: "auto", "cpu" or "cuda".

    Returns:
        `seconds` per stage and total, `host_peak_bytes`, `gpu_peak_bytes` and `flops`.
    """
    clock = Clock()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with clock.stage("load"):
        samples = calibration_samples(model_folder, text, nsamples, seqlen)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
        model.to(device).eval()
    with clock.stage("gradients"):
        gradients = gradient_magnitudes(model, samples)
    with clock.stage("prune"):
        prune(model, samples, gradients)
    with clock.stage("save"):
        model.save_pretrained(output)
    weights = sum(total.numel() for block in gradients for total in block.values())
    return {
        "seconds": {**clock.seconds, "total": round(sum(clock.seconds.values()), 3)},
        "host_peak_bytes": host_peak_bytes(),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else 0,
        "flops": 10 * weights * nsamples * seqlen,
    }


def main() -> int:
    """Prune what the command line names and print one JSON object."""
    parser = argparse.ArgumentParser(description="GBLM pruning with the complete model in memory.")
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to create")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8")
    parser.add_argument("--nsamples", type=int, default=8, metavar="N", help="[%(default)s]")
    parser.add_argument("--seqlen", type=int, default=512, metavar="T", help="[%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="[%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    arguments = vars(parser.parse_args())
    print(json.dumps(run(arguments.pop("model"), arguments.pop("output"), **arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
