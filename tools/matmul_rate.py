#!/usr/bin/env python3
"""The rate at which a machine multiplies matrices of a model's shapes: what a run could reach.

Three products per matrix W [out, in] and sample of T tokens, 2·T·in·out FLOPs each:

    forward   X [T, in]   · Wᵀ [in, out]
        input     dY [T, out] · W [out, in]     the gradient for the block before
    weight    dYᵀ [out, T] · X [T, in]      the gradient of the sample

Usage:
    python tools/matmul_rate.py [--shape NAME] [--seqlen T] [--dtype NAME] [--device NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

sys.dont_write_bytecode = True  # keeps the folder of the tools free of caches

import torch  # noqa: E402
from bench_model import DTYPES, SHAPES, Shape, Size  # noqa: E402

PRODUCTS = ("forward", "input", "weight")
WARM_UPS = 1
REPETITIONS = 5
# A GPU is only asked now and then whether it is done, or asking would be what is measured.
PRODUCTS_PER_CUDA_TIMING = 20

Product = Callable[[], object]


def rates(shape: Shape, *, seqlen: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Measure the products of all matrices of a block.

    Every repetition goes through all products, so that none finds its operands in a cache because
    it was just measured.

    Args:
        shape: Shape of the model.
        seqlen: The number T of tokens.
        dtype: Dtype of the operands.
        device: Device of the operands.

    Returns:
        FLOP/s of every product, over the matrices of a block as often as they are in it.
    """
    products = {
        (kind, size): product
        for size in shape.matrices()
        for kind, product in operands(size, seqlen, dtype, device).items()
    }
    seconds: dict[tuple[str, Size], list[float]] = {key: [] for key in products}
    for _ in range(WARM_UPS + REPETITIONS):
        for key, product in products.items():
            seconds[key].append(timed(product, device))
    medians = {key: statistics.median(values[WARM_UPS:]) for key, values in seconds.items()}
    return {kind: rate(shape, seqlen, kind, medians) for kind in PRODUCTS}


def rate(shape: Shape, seqlen: int, kind: str, medians: dict[tuple[str, Size], float]) -> float:
    """Return FLOP/s of one kind of product, from the median seconds of every matrix shape."""
    counts = shape.matrices().items()
    flops = sum(2 * seqlen * size[0] * size[1] * count for size, count in counts)
    return flops / sum(medians[kind, size] * count for size, count in counts)


def operands(
    size: Size, seqlen: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Product]:
    """Return the three products of one matrix shape; results go to existing memory."""
    weight_OI = torch.randn(size, dtype=dtype, device=device)
    input_TI = torch.randn(seqlen, size[1], dtype=dtype, device=device)
    gradient_TO = torch.randn(seqlen, size[0], dtype=dtype, device=device)
    out_TO, out_TI = torch.empty_like(gradient_TO), torch.empty_like(input_TI)
    out_OI = torch.empty_like(weight_OI)
    return {
        "forward": lambda: torch.mm(input_TI, weight_OI.T, out=out_TO),
        "input": lambda: torch.mm(gradient_TO, weight_OI, out=out_TI),
        "weight": lambda: torch.mm(gradient_TO.T, input_TI, out=out_OI),
    }


def timed(product: Product, device: torch.device) -> float:
    """Return the seconds of one product."""
    if device.type != "cuda":
        start = time.perf_counter()
        product()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(PRODUCTS_PER_CUDA_TIMING):
        product()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / PRODUCTS_PER_CUDA_TIMING


def main() -> int:
    """Measure what the command line asks for and print one JSON object."""
    parser = argparse.ArgumentParser(description="FLOP/s of products at a model's shapes.")
    parser.add_argument("--shape", choices=SHAPES, default="laptop", help="[%(default)s]")
    parser.add_argument("--seqlen", type=int, default=512, metavar="T", help="[%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="[%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    asked = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if asked.device == "auto" else asked.device)
    measured = rates(
        SHAPES[asked.shape], seqlen=asked.seqlen, dtype=getattr(torch, asked.dtype), device=device
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({**measured, "device": name, "threads": torch.get_num_threads()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
