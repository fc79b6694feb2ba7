"""Matrices in 4 or 8 bits. The only file that touches bitsandbytes.

The import takes seconds and most runs quantize nothing, so it happens at the first matrix.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_gblm.errors import RequestError, shown

QuantizedKind = Literal["nf4", "int8"]

# Numbers that share one float32 scale.
BLOCK = {"nf4": 64, "int8": 256}
# Index of zero in the dynamic maps of bitsandbytes, by `signed`.
_ZERO = {True: 127, False: 0}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix in 4 bits (nf4, QLoRA, arXiv 2305.14314) or in 8 (arXiv 2110.02861).

    A zero is dequantized to exactly zero.

    Attributes:
        dtype: Dtype of the matrix: float32, bfloat16 or float16.
        codes: uint8, one or two numbers in each.
        scales: float32, the largest magnitude of every block of numbers.
    """

    kind: QuantizedKind
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """Return the matrix, contiguous, on the device of the codes."""
        if self.kind == "nf4":
            flat = _from_4_bits(self.codes, self.scales, self.dtype)
        else:
            flat = from_8_bits(self.codes, self.scales, self.dtype, signed=True)
        return flat[: self.shape.numel()].view(self.shape)


def quantize(matrix: Tensor, kind: QuantizedKind) -> Quantized:
    """Quantize a matrix, which is not modified, on its own device."""
    flat = matrix.reshape(-1)
    if kind == "nf4":
        codes, scales = _to_4_bits(flat)
    else:
        codes, scales = to_8_bits(flat, signed=True)
    return Quantized(kind=kind, shape=matrix.shape, dtype=matrix.dtype, codes=codes, scales=scales)


def check_usable(device: torch.device, kind: QuantizedKind) -> None:
    """Raise `RequestError` if bitsandbytes cannot quantize on a device; a run needs it later."""
    numbers = torch.arange(256.0).to(device)
    try:
        found = quantize(numbers, kind).dequantized()
    # It raises whatever its library for this device does.
    except Exception as error:
        raise RequestError(
            f"bitsandbytes cannot quantize to {kind} on {device}: {shown(str(error))}. Install a "
            f"version of it for this device, or leave --compute-weights and --disk out"
        ) from error
    assert float(found[0]) == 0, "a zero is not dequantized to zero"


def to_8_bits(flat: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize numbers in blocks of 256 by the dynamic map, -1 or 0 to 1 times a scale.

    The numbers are float32, bfloat16 or float16, finite, negative only if `signed`, and not
    modified. Returns codes, uint8, one for each number, and scales, float32, one for each block.
    """
    code = _dynamic_map(flat.device, signed=signed)
    codes, state = _functional().quantize_blockwise(flat, code=code, blocksize=BLOCK["int8"])
    # CPUs take codes from a table too coarse for numbers below 2^-16 of the scale, zero included.
    codes.masked_fill_(flat == 0, _ZERO[signed])
    return codes, state.absmax


def from_8_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """Return the numbers that `to_8_bits` was given, rounded; zeros are exact."""
    state = _functional().QuantState(
        absmax=scales,
        code=_dynamic_map(codes.device, signed=signed),
        dtype=dtype,
        blocksize=BLOCK["int8"],
    )
    flat: Tensor = _functional().dequantize_blockwise(codes, state)
    return flat


def _to_4_bits(flat: Tensor) -> tuple[Tensor, Tensor]:
    if flat.numel() % 2:
        # Two numbers share a byte. On CPUs an odd count would take a path that needs a compiler.
        flat = torch.cat([flat, flat.new_zeros(1)])
    codes, state = _functional().quantize_4bit(flat, blocksize=BLOCK["nf4"], quant_type="nf4")
    return codes, state.absmax


def _from_4_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    state = _functional().QuantState(
        absmax=scales,
        shape=(2 * codes.numel(),),
        dtype=dtype,
        blocksize=BLOCK["nf4"],
        quant_type="nf4",
    )
    read: Tensor = _functional().dequantize_4bit(codes, state)
    return read.reshape(-1)


@functools.cache
def _functional() -> Any:
    # It warns that a kernel for inference is missing, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes.functional")


@functools.cache
def _dynamic_map(device: torch.device, *, signed: bool) -> Tensor:
    """Return the 256 numbers that 8 bits stand for, float32, rising."""
    code: Tensor = _functional().create_dynamic_map(signed=signed).to(device)
    return code
