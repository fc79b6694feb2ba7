"""Rows of tokens whose labels are to be scored, packed into batches of about equal lengths.

Rows are padded on the right. Blocks are causal, so nothing before the padding sees it, and no mask
is needed. Rows with a long common prefix may be one line (`model.shared_prefix`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from lowmem_gblm.model.lengths import rounded_up
from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.sweeps.prefix_groups import share_prefixes

# Tokens that a batch may have, unless it is a single line. So many are divisible by many numbers of
# lines: all full batches of more than 3 lines have as many tokens, and oneDNN compiles one product
# for all of them.
TOKENS_AT_ONCE = 1680
_LINES = [lines for lines in range(1, TOKENS_AT_ONCE + 1) if TOKENS_AT_ONCE % lines == 0]
# Fewer lines are padded to one of so many lengths between two powers of two instead, which are 4
# tokens apart at least.
_FEW_LINES, _LENGTHS, _SMALLEST_STEP = 3, 8, 4
_PADDING = 0


class Score(NamedTuple):
    """The sum of the log-probabilities of a row's labels; whether each is the likeliest token."""

    log_probability: float
    is_likeliest: bool


@dataclass(frozen=True)
class Row:
    """Tokens that a model reads, and the labels of its positions from `first` on.

    Tokens and labels are int32, as bytes: there are many rows, and a dictionary of their scores.
    """

    tokens: bytes
    labels: bytes
    first: int

    @classmethod
    def of(cls, tokens: Sequence[int], labels: Sequence[int], first: int) -> Self:
        """Return the row of these tokens and labels."""
        return cls(_packed(tokens), _packed(labels), first)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens) // 4


@dataclass(frozen=True)
class Batch:
    """Rows that pass through the blocks at once.

    Attributes:
        tokens_BT: The tokens of every line, int32.
        sequences: The sequences of all lines, in order: the rows that have the same tokens. They
            differ in their labels.
        layout: How a line has several sequences; None if it is one.
    """

    tokens_BT: Tensor
    sequences: Sequence[Sequence[Row]]
    layout: SharedPrefix | None = None

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return all token ids: those that the model reads, and the labels."""
        return self.tokens_BT, self.wanted()[1]

    def wanted(self) -> tuple[Tensor, Tensor]:
        """Return the places of all labels in the flattened batch, int64 [K], and the labels [K]."""
        places, labels = [], []
        for number, rows in enumerate(self.sequences):
            for row in rows:
                labels.append(_unpacked(row.labels))
                positions_K = row.first + torch.arange(len(labels[-1]))
                places.append(self._places(number, positions_K))
        return torch.cat(places), torch.cat(labels)

    def _places(self, number: int, positions_K: Tensor) -> Tensor:
        """Return the places of positions in the sequence of this number."""
        length = self.tokens_BT.shape[1]
        if self.layout is None:
            return number * length + positions_K
        line, ending = divmod(number, self.layout.endings)
        return line * length + self.layout.places(ending, positions_K)

    def scores(self, losses_K: Tensor, likeliest_K: Tensor) -> Iterator[tuple[Row, Score]]:
        """Yield every row with its score, from what `StreamedModel.token_losses` returns."""
        rows = [row for rows in self.sequences for row in rows]
        lengths = [len(row.labels) // 4 for row in rows]
        losses = losses_K.cpu().double().split(lengths)
        likeliest = likeliest_K.cpu().split(lengths)
        for row, loss, likely in zip(rows, losses, likeliest, strict=True):
            yield row, Score(-float(loss.sum()), bool(likely.all()))


def pack(rows: Iterable[Row], tokens_at_once: int, *, sharing: int = 0) -> list[Batch]:
    """Return batches of all rows, the longest lines first; rows of the same tokens are one.

    A batch has at most `tokens_at_once` tokens, or a single line. A prefix is shared by sequences
    of at most `sharing` tokens.
    """
    alone: dict[bytes, list[Row]] = defaultdict(list)
    for row in dict.fromkeys(rows):
        alone[row.tokens].append(row)
    batches = []
    groups = share_prefixes(alone, longest_sequence=sharing, tokens_at_once=tokens_at_once)
    for layout, lines in groups.items():
        left = iter(lines)
        while some := list(islice(left, tokens_at_once // len(layout))):
            tokens_BT = torch.stack([_line(line, layout) for line in some])
            sequences = [alone.pop(tokens) for line in some for tokens in line]
            batches.append(Batch(tokens_BT, sequences, layout))
    batches += _batches_alone(list(alone.values()), tokens_at_once)
    return sorted(batches, key=lambda batch: -batch.tokens_BT.shape[1])


def _batches_alone(sequences: list[list[Row]], tokens_at_once: int) -> Iterator[Batch]:
    """Yield batches of lines of one sequence each."""
    # Those of one length stay in order, so that neighbors are likely to be of one task.
    sequences.sort(key=lambda rows: -len(rows[0]))
    left = iter(sequences)
    for rows in left:
        lines, length = shape_for(len(rows[0]), tokens_at_once)
        # No position is beyond those of the longest row.
        length = min(length, len(sequences[0][0]))
        some = [rows, *islice(left, lines - 1)]
        tokens_BT = torch.full((len(some), length), _PADDING, dtype=torch.int32)
        for tokens_T, (row, *_) in zip(tokens_BT, some, strict=True):
            tokens_T[: len(row)] = _unpacked(row.tokens)
        yield Batch(tokens_BT, some)


def shape_for(length: int, tokens_at_once: int) -> tuple[int, int]:
    """Return how many lines a batch has whose longest has this length, and their padded length."""
    padded = rounded_up(length, _LENGTHS, _SMALLEST_STEP)
    lines = max((lines for lines in _LINES if lines * length <= tokens_at_once), default=1)
    if lines > _FEW_LINES:
        return lines, tokens_at_once // lines
    return max(1, min(lines, tokens_at_once // padded)), padded


def _line(sequences: Sequence[bytes], layout: SharedPrefix) -> Tensor:
    """Return the tokens of a line [T]: the prefix, then the ending of every sequence, padded."""
    tokens_T = torch.full((len(layout),), _PADDING, dtype=torch.int32)
    for number, tokens in enumerate(map(_unpacked, sequences)):
        tokens_T[layout.places(number, torch.arange(len(tokens)))] = tokens
    return tokens_T


def _packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()


def _unpacked(packed: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(packed, dtype=np.int32).copy())
