#!/usr/bin/env python3
"""Measures plain forward passes of a model that is in memory: what a run's passes cannot go below.

The decoder alone runs, without the head, on the calibration samples that a run would draw.

Usage:
    python tools/forward_pass.py MODEL --text FILE [--nsamples N] [--seqlen T] [--dtype NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lowmem_gblm.commands.calibration import calibration_samples
from lowmem_gblm.commands.texts import open_source
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.runtime import accelerator


def seconds_of_a_pass(asked: argparse.Namespace) -> list[float]:
    """Return the seconds of every pass over all samples, after one that is not counted."""
    device = accelerator.choose_device(asked.device)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    decoder = model.to(device).eval().get_decoder()
    samples = calibration_samples(
        open_source(asked.text, "calibration"),
        load_tokenizer(asked.model),
        nsamples=asked.nsamples,
        seqlen=asked.seqlen,
        seed=0,
    )
    samples_NT = samples.tokens_NT.to(device)
    found = []
    with torch.no_grad():
        for _ in range(1 + asked.repeat):
            accelerator.synchronize(device)
            start = time.perf_counter()
            for tokens_T in samples_NT:
                decoder(input_ids=tokens_T[None], use_cache=False)
            accelerator.synchronize(device)
            found.append(time.perf_counter() - start)
    return found[1:]


def main() -> int:
    """Measure what the command line asks for and print one JSON object."""
    parser = argparse.ArgumentParser(description="Seconds of plain forward passes in memory.")
    option = parser.add_argument
    option("model", type=Path, metavar="MODEL")
    option("--text", required=True, metavar="FILE")
    option("--nsamples", type=int, default=8, metavar="N", help="[%(default)s]")
    option("--seqlen", type=int, default=512, metavar="T", help="[%(default)s]")
    option("--dtype", default="float32", metavar="NAME", help="[%(default)s]")
    option("--device", default="auto", help="auto, cpu, cuda or xpu [%(default)s]")
    option("--repeat", type=int, default=3, metavar="N", help="[%(default)s]")
    found = seconds_of_a_pass(parser.parse_args())
    print(json.dumps({"seconds": statistics.median(found), "all": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
