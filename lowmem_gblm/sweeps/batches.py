"""Rows of tokens whose labels are to be scored, packed into batches of about equal lengths.

Rows are padded on the right. Blocks are causal, so nothing before the padding sees it, and no mask
is needed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

# Tokens that a batch may have if its longest row has fewer.
TOKENS_AT_ONCE = 2048
# Between two powers of two a batch is padded to one of so many lengths, which are 4 tokens apart at
# least: how blocks are called is remembered for every shape.
_LENGTHS, _SMALLEST_STEP = 8, 4
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
        lines: For every line, the rows that have its tokens: they differ in their labels.
    """

    tokens_BT: Tensor
    lines: Sequence[Sequence[Row]]

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return all token ids: those that the model reads, and the labels."""
        return self.tokens_BT, self.wanted()[1]

    def wanted(self) -> tuple[Tensor, Tensor]:
        """Return the places of all labels in the flattened batch, int64 [K], and the labels [K]."""
        length = self.tokens_BT.shape[1]
        places, labels = [], []
        for number, rows in enumerate(self.lines):
            for row in rows:
                labels.append(_unpacked(row.labels))
                places.append(number * length + row.first + torch.arange(len(labels[-1])))
        return torch.cat(places), torch.cat(labels)

    def scores(self, losses_K: Tensor, likeliest_K: Tensor) -> Iterator[tuple[Row, Score]]:
        """Yield every row with its score, from what `StreamedModel.token_losses` returns."""
        rows = [row for rows in self.lines for row in rows]
        lengths = [len(row.labels) // 4 for row in rows]
        losses = losses_K.cpu().double().split(lengths)
        likeliest = likeliest_K.cpu().split(lengths)
        for row, loss, likely in zip(rows, losses, likeliest, strict=True):
            yield row, Score(-float(loss.sum()), bool(likely.all()))


def pack(rows: Iterable[Row], tokens_at_once: int) -> list[Batch]:
    """Return batches of all rows, the longest first; rows of the same tokens share a line.

    A batch has at most `tokens_at_once` tokens, or a single line.
    """
    lines: dict[bytes, list[Row]] = defaultdict(list)
    for row in dict.fromkeys(rows):
        lines[row.tokens].append(row)
    # Lines of one length stay in order, so that neighbors are likely to be of one task.
    order = sorted(lines.values(), key=lambda line: -len(line[0]))
    longest = len(order[0][0])
    left, batches = iter(order), []
    for line in left:
        length = min(padded(len(line[0])), longest)
        lines_of_batch = [line, *islice(left, max(1, tokens_at_once // length) - 1)]
        batches.append(Batch(_tokens(lines_of_batch, length), lines_of_batch))
    return batches


def padded(length: int) -> int:
    """Return the length that rows of this length are padded to: at most an eighth more, or 3."""
    step = max(_SMALLEST_STEP, (1 << (length.bit_length() - 1)) // _LENGTHS)
    return -(-length // step) * step


def _tokens(lines: Sequence[Sequence[Row]], length: int) -> Tensor:
    tokens_BT = torch.full((len(lines), length), _PADDING, dtype=torch.int32)
    for tokens_T, line in zip(tokens_BT, lines, strict=True):
        tokens_T[: len(line[0])] = _unpacked(line[0].tokens)
    return tokens_BT


def _packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()


def _unpacked(packed: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(packed, dtype=np.int32).copy())
