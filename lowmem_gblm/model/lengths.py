"""Few lengths for many: between two powers of two there are `count` of them, evenly spaced.

Blocks and products of every shape cost something to prepare: calls to record, code to compile.
"""


def rounded_up(number: int, count: int, smallest_step: int = 1) -> int:
    """Return the next of these lengths, which are `smallest_step` apart at least."""
    step = _step(number, count, smallest_step)
    return -(-number // step) * step


def rounded_down(number: int, count: int, smallest_step: int = 1) -> int:
    """Return the last of these lengths, which may be 0."""
    step = _step(number, count, smallest_step)
    return number // step * step


def _step(number: int, count: int, smallest_step: int) -> int:
    return max(smallest_step, (1 << number.bit_length()) // 2 // count)
