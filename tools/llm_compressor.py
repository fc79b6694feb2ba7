#!/usr/bin/env python3
"""Wanda or SparseGPT by LLM Compressor, on the CPU: a baseline in an environment of its own.

Runs under the interpreter of an environment that holds `llmcompressor`; `tools/bench` makes one.

Usage:
    python tools/llm_compressor.py MODEL OUTPUT --method wanda|sparsegpt --text FILE
        [--nsamples N] [--seqlen T] [--dtype NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # keeps the folder of the tools free of caches
os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # its log goes to stdout
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it would take a GPU if there is one

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from in_memory import DTYPES, SPARSITY, calibration_samples, host_peak_bytes  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.pruning import (  # noqa: E402
    SparseGPTModifier,
    WandaPruningModifier,
)
from transformers import AutoModelForCausalLM  # noqa: E402

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def run(
    model_folder: Path,
    output: Path,
    *,
    method: str,
    text: Path,
    nsamples: int,
    seqlen: int,
    dtype: str,
) -> dict[str, Any]:
    """Prune a checkpoint into a new one.

    Args:
        model_folder: The dense checkpoint.
        output: Folder for the pruned checkpoint.
        method: One of `MODIFIERS`.
        text: UTF-8 file for the calibration samples, the same as in every run of the benchmark.
        nsamples: Number of samples.
        seqlen: Tokens of a sample.
        dtype: Dtype of weights and computation.

    Returns:
        `seconds` (total) and `host_peak_bytes`.
    """
    start = time.monotonic()
    samples_NT = calibration_samples(model_folder, text, nsamples, seqlen).squeeze(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": samples_NT.tolist(), "attention_mask": (samples_NT >= 0).tolist()}
        ),
        recipe=MODIFIERS[method](sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"]),
        num_calibration_samples=nsamples,
        max_seq_length=seqlen,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(output, save_compressed=False)
    total = round(time.monotonic() - start, 3)
    return {"seconds": {"total": total}, "host_peak_bytes": host_peak_bytes()}


def main() -> int:
    """Prune what the command line names and print one JSON object."""
    parser = argparse.ArgumentParser(description="Wanda or SparseGPT by LLM Compressor.")
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a checkpoint")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to create")
    parser.add_argument("--method", choices=MODIFIERS, required=True)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8")
    parser.add_argument("--nsamples", type=int, default=8, metavar="N", help="[%(default)s]")
    parser.add_argument("--seqlen", type=int, default=512, metavar="T", help="[%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="[%(default)s]")
    arguments = vars(parser.parse_args())
    print(json.dumps(run(arguments.pop("model"), arguments.pop("output"), **arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
