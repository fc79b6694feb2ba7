"""Which sequences of tokens share a prefix, so that it is computed once for all of them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from lowmem_gblm.model.lengths import rounded_down, rounded_up
from lowmem_gblm.model.shared_prefix import SharedPrefix

_TOKEN_BYTES = 4
# Attention computes T² scores for a line of T tokens, most of them for nothing.
_LONGEST_LINE = 512
# Between two powers of two, prefixes are cut and endings padded to one of so many lengths, which
# are 8 tokens apart at least.
_LENGTHS, _SMALLEST_STEP = 4, 8
# How blocks are called is remembered for every layout, its mask of T × T numbers included.
_MASK_NUMBERS = 1 << 22

Groups = dict[SharedPrefix, list[list[bytes]]]


def share_prefixes(
    sequences: Collection[bytes], *, longest_sequence: int, tokens_at_once: int
) -> Groups:
    """Return groups of sequences that share a prefix, by the layout of their lines.

    A sequence is int32 tokens as bytes. Those that no group takes are to be computed alone: longer
    ones than `longest_sequence`, those that share too little, and those whose layouts save least
    for the memory of a mask.
    """
    most = min(tokens_at_once, _LONGEST_LINE)
    found: Groups = defaultdict(list)
    saved: Counter[SharedPrefix] = Counter()
    fitting = [one for one in sequences if len(one) <= longest_sequence * _TOKEN_BYTES]
    for layout, group in _groups(sorted(fitting), longest_sequence, most):
        found[layout].append(group)
        saved[layout] += sum(map(_tokens_in, group)) - len(layout)
    kept, room = {}, _MASK_NUMBERS
    for layout in sorted(found, key=lambda one: -saved[one] / len(one) ** 2):
        if len(layout) ** 2 <= room:
            kept[layout] = found[layout]
            room -= len(layout) ** 2
    return kept


def remembered_numbers(layouts: Collection[SharedPrefix], head_size: int) -> int:
    """Return how many numbers are remembered for these layouts: masks, and rotary tables.

    Tables are those of two numbers of lines: of full batches, and of the last one.
    """
    return sum(len(one) ** 2 + 2 * 2 * len(one) * head_size for one in layouts)


def _groups(
    ordered: Sequence[bytes], longest_sequence: int, most: int
) -> Iterator[tuple[SharedPrefix, list[bytes]]]:
    """Yield neighbors that share a prefix, as many as make the line cheaper than without them."""
    group: list[bytes] = []
    layout: SharedPrefix | None = None
    shared = longest = 0
    for sequence in ordered:
        length = _tokens_in(sequence)
        if group:
            both = min(shared, _common(group[-1], sequence))
            wider = _layout(both, max(longest, length), len(group) + 1, longest_sequence)
            alone = longest if layout is None else len(layout)
            if wider is not None and len(wider) <= most and len(wider) < alone + length:
                group.append(sequence)
                layout, shared, longest = wider, both, max(longest, length)
                continue
            if layout is not None:
                yield layout, group
        group, layout, shared, longest = [sequence], None, length, length
    if layout is not None:
        yield layout, group


def _layout(shared: int, longest: int, endings: int, longest_sequence: int) -> SharedPrefix | None:
    """Return the layout of sequences that share so many tokens, of which the longest has so many.

    No position in it is beyond those of the longest sequence of all.
    """
    prefix = rounded_down(shared, _LENGTHS, _SMALLEST_STEP)
    if not prefix:
        return None
    ending = rounded_up(longest - prefix, _LENGTHS, _SMALLEST_STEP)
    return SharedPrefix(prefix, min(ending, longest_sequence - prefix), endings)


def _tokens_in(sequence: bytes) -> int:
    return len(sequence) // _TOKEN_BYTES


def _common(one: bytes, other: bytes) -> int:
    """Return how many tokens two sequences begin with alike."""
    both = min(len(one), len(other)) // _TOKEN_BYTES
    same = np.frombuffer(one, np.int32, both) == np.frombuffer(other, np.int32, both)
    return both if same.all() else int(same.argmin())
