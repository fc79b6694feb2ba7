"""Pictures of numbers that a page can hold: PNG images as data URIs, and paths of inline SVG."""

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The dispersion where the scale of colours ends: the same in every report.
HIGHEST = 100

_GREY_OF_8_BITS = struct.pack(">BBBBB", 8, 0, 0, 0, 0)


def png_uri(density_RC: Tensor) -> str:
    """Return a grey image as a data URI: white where all weights are zero, black where none is."""
    grey_RC = (density_RC * 255).round().to(torch.uint8)
    rows, columns = grey_RC.shape
    # Every line begins with its filter, 0 for none.
    lines = torch.nn.functional.pad(grey_RC, (1, 0)).contiguous().numpy().tobytes()
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", struct.pack(">II", columns, rows) + _GREY_OF_8_BITS),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def steps(values: Sequence[float], highest: float, height: int, *, closed: bool) -> str:
    """Return the path of a histogram: one unit a bin, `highest` at the top of `height` units.

    Bins at the ends without a visible height are left out. A `closed` path can be filled.
    """
    levels = [height - round(height * value / highest, 1) for value in values]
    seen = [at for at, level in enumerate(levels) if level < height]
    if not seen:
        return ""
    start, stop = seen[0], seen[-1] + 1
    return (
        f"M{start} {height}"
        + "".join(_turns(levels, start, stop))
        + (f"V{height}Z" if closed else f"V{height}")
    )


def _turns(levels: Sequence[float], start: int, stop: int) -> Iterator[str]:
    """Yield a vertical line where the level changes, and a horizontal one to the next change."""
    for at in range(start, stop):
        if at == start or levels[at] != levels[at - 1]:
            yield f"V{levels[at]:g}"
        if at + 1 == stop or levels[at + 1] != levels[at]:
            yield f"H{at + 1}"


def level(dispersion: float) -> int:
    """Return the place of a number from 1 to `HIGHEST` on a logarithmic scale, in percent."""
    return round(100 * math.log(min(max(dispersion, 1.0), HIGHEST)) / math.log(HIGHEST))
