#!/usr/bin/env python3
"""Compares the sweeps of a run with plain passes of the model in memory, in turns.

After blocks of a sweep one sample runs through the decoder, without the head, of the same model in
memory: forward, and in the reverse sweep also forward and backward. That takes at most half of the
time. The speed of a machine may change by a half from one minute to the next; what is compared is
measured within seconds. OUTPUT is pruned; its memory means nothing.

Usage:
    python tools/plain_passes.py MODEL OUTPUT --text FILE [--nsamples N] [--seqlen T] [--dtype NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lowmem_gblm
from lowmem_gblm.commands.calibration import calibration_samples
from lowmem_gblm.commands.texts import open_source
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.runtime import accelerator

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SWEEPS = ("dense", "reverse", "prune")


class InTurns:
    """A listener of a run that lets samples through the decoder in memory between blocks.

    The first comes after the first block of a sweep; the next ones wait until the run has had as
    much time for itself.

    Attributes:
        seconds: By sweep and by kind of pass, the seconds of every sample.
    """

    def __init__(self, decoder: Any, samples_NT: Tensor) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self._decoder = decoder
        self._samples_NT = samples_NT
        self._next = 0.0
        matrices = {
            layer.weight for layer in decoder.layers.modules() if isinstance(layer, nn.Linear)
        }
        for parameter in decoder.parameters():
            parameter.requires_grad_(parameter in matrices)
        # A gradient goes before the next one comes, as in a run.
        for weight in matrices:
            weight.register_post_accumulate_grad_hook(_without_gradient)

    def __call__(self, tick: lowmem_gblm.Tick) -> None:
        if tick.stage not in SWEEPS:
            return
        start = time.perf_counter()
        if tick.stage in self.seconds and start < self._next:
            return
        taken = self.seconds.setdefault(tick.stage, defaultdict(list))
        number = len(taken["forward"]) % len(self._samples_NT)
        taken["forward"].append(self.forward(number))
        if tick.stage == "reverse":
            taken["backward"].append(self.backward(number))
        ended = time.perf_counter()
        self._next = ended + (ended - start)

    def forward(self, number: int) -> float:
        """Return the seconds of a forward pass of a sample."""
        with torch.no_grad():
            return self._timed(lambda: self._hidden(number))

    def backward(self, number: int) -> float:
        """Return the seconds of a forward pass and the gradients of all matrices of the blocks."""
        with torch.enable_grad():
            return self._timed(lambda: self._hidden(number).sum().backward())

    def _hidden(self, number: int) -> Tensor:
        sample_1T = self._samples_NT[number][None]
        return self._decoder(input_ids=sample_1T, use_cache=False).last_hidden_state

    def _timed(self, work: Callable[[], object]) -> float:
        device = self._samples_NT.device
        accelerator.synchronize(device)
        start = time.perf_counter()
        work()
        accelerator.synchronize(device)
        return time.perf_counter() - start


def _without_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def compared(asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return of every sweep its `seconds`, and those of plain passes over all samples.

    `forward` is a forward pass; `backward`, of the reverse sweep, a forward and a backward pass.
    """
    device = accelerator.choose_device(asked.device)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    samples = calibration_samples(
        open_source(asked.text, "calibration"),
        load_tokenizer(asked.model),
        nsamples=asked.nsamples,
        seqlen=asked.seqlen,
        seed=0,
    )
    turns = InTurns(model.to(device).eval().get_decoder(), samples.tokens_NT.to(device))
    turns.forward(0)
    turns.backward(0)
    record = lowmem_gblm.prune(
        asked.model,
        asked.output,
        listener=turns,
        calibration=asked.text,
        nsamples=asked.nsamples,
        seqlen=asked.seqlen,
        dtype=asked.dtype,
        device=asked.device,
        method=asked.method,
        activations=asked.activations,
    )
    return {
        name: {
            "seconds": record["seconds"][name] - sum(map(sum, passes.values())),
            **{kind: statistics.mean(taken) * asked.nsamples for kind, taken in passes.items()},
        }
        for name, passes in turns.seconds.items()
    }


def main() -> int:
    """Measure what the command line asks for and print one JSON object."""
    parser = argparse.ArgumentParser(description="A run's sweeps beside plain passes.")
    option = parser.add_argument
    option("model", type=Path, metavar="MODEL")
    option("output", type=Path, metavar="OUTPUT")
    option("--text", required=True, metavar="FILE")
    option("--nsamples", type=int, default=8, metavar="N", help="[%(default)s]")
    option("--seqlen", type=int, default=512, metavar="T", help="[%(default)s]")
    option("--dtype", default="float32", metavar="NAME", help="[%(default)s]")
    option("--device", default="auto", help="auto, cpu, cuda or xpu [%(default)s]")
    option("--method", default="gblm", metavar="METHOD", help="[%(default)s]")
    option("--activations", default="pruned", help="pruned or dense [%(default)s]")
    print(json.dumps(compared(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
