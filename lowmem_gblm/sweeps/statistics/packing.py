"""The format of gradient magnitudes between the sweep that measures and the one that prunes.

In 8 bits, square roots are kept, in blocks of 256 numbers with one float32 scale each, by the
unsigned dynamic map of bitsandbytes (arXiv 2110.02861): seven decades of the root, fourteen of the
magnitude. A block has heavy tails; a linear map, or a map of the magnitude itself, loses the small
ones.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.bnb import BLOCK, from_8_bits, to_8_bits
from lowmem_gblm.planning.sizes import GradientPrecision

_BLOCK = BLOCK["int8"]
# Numbers of which a root is held at once: complete blocks.
_TILE = 1 << 22


def pack(magnitude: Tensor, kind: GradientPrecision) -> tuple[Tensor, ...]:
    """Pack finite gradient magnitudes, float32, into tensors on the same device; see `packed`.

    The given tensor, of any shape, is not modified; in float32 the result shares its memory.
    """
    smallest, largest = magnitude.aminmax()
    if not bool(largest.isfinite()):
        raise NonFiniteError("a gradient magnitude is NaN or infinite")
    assert bool(smallest >= 0), "a magnitude is negative"
    if kind == "float32":
        return (magnitude,)
    if kind == "bfloat16":
        # What lies above the largest bfloat16 would become infinite.
        return (magnitude.bfloat16().clamp_(max=torch.finfo(torch.bfloat16).max),)
    return _quantized_roots(magnitude.reshape(-1))


def packed(
    name: str, kind: GradientPrecision, shape: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that `pack` makes of a tensor, by a name for each."""
    if kind == "int8":
        numel = math.prod(shape)
        scales = (torch.float32, (-(-numel // _BLOCK),))
        return {name: (torch.uint8, (numel,)), f"{name} scales": scales}
    return {name: (torch.bfloat16 if kind == "bfloat16" else torch.float32, shape)}


def unpack(parts: Sequence[Tensor], kind: GradientPrecision, shape: Sequence[int]) -> Tensor:
    """Return magnitudes from the parts of `pack`, float32 on their device; zeros stay zero.

    Where they were kept in float32 the result shares memory with the parts.
    """
    if kind == "int8":
        return _squares(*parts).view(*shape)
    return parts[0].view(*shape).float()


def _quantized_roots(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [numbers], and the largest root of every block, float32 [blocks]."""
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scales = flat.new_empty(-(-flat.numel() // _BLOCK))
    for part, blocks in _tiles(flat.numel()):
        codes[part], scales[blocks] = to_8_bits(flat[part].sqrt(), signed=False)
    return codes, scales


def _squares(codes: Tensor, scales: Tensor) -> Tensor:
    squares = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for part, blocks in _tiles(codes.numel()):
        roots = from_8_bits(codes[part], scales[blocks], torch.float32, signed=False)
        torch.square(roots, out=squares[part])
    return squares


def _tiles(numel: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the numbers, each with the slice of their blocks."""
    for start in range(0, numel, _TILE):
        block = start // _BLOCK
        yield slice(start, start + _TILE), slice(block, block + _TILE // _BLOCK)
