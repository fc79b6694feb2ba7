"""Windows of the calibration text beside its samples: candidates are judged by their loss."""

import random
from collections.abc import Sequence

from lowmem_gblm.errors import RequestError


def held_out_windows(nsamples: int) -> int:
    """Return how many windows are held out for this many samples: an eighth, and at least 8."""
    return max(8, nsamples // 8)


def held_out_starts(
    samples: Sequence[int], total: int, length: int, count: int, draw: random.Random
) -> list[int]:
    """Draw where windows begin that overlap neither each other nor the samples.

    Args:
        samples: Where the samples begin.
        total, length: Tokens of the text, and of a sample or a window.
        count: How many windows are wanted; fewer are returned if the text is too short.
    """
    free: list[int] = []
    begin = 0
    for end in [*sorted(samples), total]:
        free += range(begin, end - length + 1, length)
        begin = end + length
    return draw.sample(free, min(count, len(free)))


def check_enough(found: int, count: int, length: int, origin: str) -> None:
    """Raise `RequestError` if a text has fewer windows beside its samples than are wanted."""
    if found < count:
        raise RequestError(
            f"beside the calibration samples {origin} has {found} windows of {length} tokens, and "
            f"{count} are needed to choose by: give a longer text, fewer --nsamples, a smaller "
            f"--seqlen, or a value instead of auto"
        )
