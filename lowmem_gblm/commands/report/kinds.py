"""Where a tensor is in a model, from its name alone: the block, and the kind of matrix."""

from collections.abc import Iterable
from typing import NamedTuple

_TAIL = "weight"
_ANY = "*"


class Place(NamedTuple):
    """A kind of matrix in a decoder block.

    Attributes:
        block: Its number; None if the name of the tensor has none.
        kind: As `k_proj`.
        name: The name of the tensor; where experts have a tensor each, with `*` for their number.
    """

    block: int | None
    kind: str
    name: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of every tensor.

    The first number of a name is the block. What follows is the kind, in which other numbers (of
    experts) are `*`, cut to its shortest end that no other kind has.
    """
    found = {}
    for name in names:
        parts = name.split(".")
        at = next((at for at, part in enumerate(parts) if part.isdecimal()), -1)
        head, tail = parts[: at + 1], [_ANY if one.isdecimal() else one for one in parts[at + 1 :]]
        kind = tuple(tail[:-1] if len(tail) > 1 and tail[-1] == _TAIL else tail)
        found[name] = int(head[-1]) if head else None, kind, ".".join([*head, *tail])
    kinds = {kind for _, kind, _ in found.values()}
    short = {kind: _shortest(kind, kinds - {kind}) for kind in kinds}
    return {name: Place(block, short[kind], all_) for name, (block, kind, all_) in found.items()}


def _shortest(kind: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    ends = (kind[-length:] for length in range(1, len(kind) + 1))
    end = next((end for end in ends if all(one[-len(end) :] != end for one in others)), kind)
    return ".".join(end)
