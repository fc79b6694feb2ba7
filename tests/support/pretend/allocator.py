"""A model of torch's caching allocator: what a GPU would have given, not only what tensors take.

Segments of 2 MiB for small pieces, of 20 MiB or of the rounded size for large ones; each stream has
its own; the best fitting free piece is split, and freed neighbours are joined again.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

SMALL, SMALL_SEGMENT = 1 << 20, 2 << 20
LARGE, LARGE_SEGMENT, ROUND = 10 << 20, 20 << 20, 2 << 20
UNIT = 512


class OutOfMemory(Exception):
    """The limit is reached, and no free segment is left to give back."""


@dataclass(eq=False)
class Piece:
    size: int
    pool: tuple[int, bool]
    free: bool = False
    before: Piece | None = field(default=None, repr=False)
    after: Piece | None = field(default=None, repr=False)


class Allocator:
    """Pieces of device memory; `reserved` is what segments take, `live` what tensors take."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.reserved = self.live = self.peak_reserved = self.peak_live = 0
        self._free: dict[tuple[int, bool], list[Piece]] = defaultdict(list)

    def take(self, size: int, stream: int) -> Piece:
        size = max(UNIT, -(-size // UNIT) * UNIT)
        pool = (stream, size <= SMALL)
        fitting = [piece for piece in self._free[pool] if piece.size >= size]
        if fitting:
            piece = min(fitting, key=lambda one: one.size)
            self._free[pool].remove(piece)
        else:
            piece = self._segment(size, pool)
        rest = piece.size - size
        if rest >= (UNIT if pool[1] else SMALL + 1):
            self._split(piece, size, rest)
        piece.free = False
        self.live += piece.size
        self.peak_live = max(self.peak_live, self.live)
        return piece

    def give_back(self, piece: Piece) -> None:
        self.live -= piece.size
        piece.free = True
        free = self._free[piece.pool]
        after, before = piece.after, piece.before
        if after is not None and after.free:
            free.remove(after)
            piece.size += after.size
            self._link(piece, after.after)
        if before is not None and before.free:
            free.remove(before)
            before.size += piece.size
            self._link(before, piece.after)
            piece = before
        free.append(piece)

    def empty_cache(self) -> None:
        """Give back the segments of which nothing is in use."""
        for free in self._free.values():
            for piece in [one for one in free if one.before is None and one.after is None]:
                free.remove(piece)
                self.reserved -= piece.size

    def reset_peak(self) -> None:
        self.peak_reserved, self.peak_live = self.reserved, self.live

    def _segment(self, size: int, pool: tuple[int, bool]) -> Piece:
        taken = SMALL_SEGMENT if pool[1] else LARGE_SEGMENT
        if size >= LARGE:
            taken = -(-size // ROUND) * ROUND
        if self.limit is not None and self.reserved + taken > self.limit:
            self.empty_cache()
            if self.reserved + taken > self.limit:
                raise OutOfMemory(f"{size} bytes; {self.reserved} of {self.limit} are taken")
        self.reserved += taken
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Piece(taken, pool)

    def _split(self, piece: Piece, size: int, rest: int) -> None:
        other = Piece(rest, piece.pool, free=True)
        self._link(other, piece.after)
        self._link(piece, other)
        piece.size = size
        self._free[piece.pool].append(other)

    @staticmethod
    def _link(one: Piece, other: Piece | None) -> None:
        one.after = other
        if other is not None:
            other.before = one
