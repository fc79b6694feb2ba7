"""Sequences that begin alike, in one line of tokens: their prefix once, then an ending of each.

An ending sees the prefix and itself, and its positions continue those of the prefix, as if it were
alone behind it. The mask is known as tree attention (SpecInfer, https://arxiv.org/abs/2305.09781).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrefix:
    """The layout of a line: `prefix` tokens, then `endings` endings of `ending` tokens each."""

    prefix: int
    ending: int
    endings: int

    def __len__(self) -> int:
        """Return the number of tokens of the line."""
        return self.prefix + self.ending * self.endings

    def places(self, number: int, positions_K: Tensor) -> Tensor:
        """Return the places in the line, int64 [K], of positions in the sequence of this number."""
        moved_K = positions_K + number * self.ending
        return torch.where(positions_K < self.prefix, positions_K, moved_K)

    def sequence(self, line: Tensor, number: int) -> Tensor:
        """Return the sequence [prefix + ending, …] of this number of a line [T, …] of anything."""
        start = self.prefix + number * self.ending
        return torch.cat([line[: self.prefix], line[start : start + self.ending]])

    def arguments(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return what a decoder takes for such lines: `attention_mask` and `position_ids`.

        The mask, [1, 1, T, T] of `dtype`, is added to the scores of attention.
        """
        places_T = torch.arange(len(self), device=device)
        behind_T = places_T - self.prefix
        number_T = behind_T.div(self.ending, rounding_mode="floor")
        position_T = torch.where(behind_T < 0, places_T, self.prefix + behind_T % self.ending)
        related_TT = (behind_T < 0) | (number_T[:, None] == number_T)
        visible_TT = related_TT & (places_T[:, None] >= places_T)
        mask_TT = torch.zeros(visible_TT.shape, dtype=dtype, device=device)
        mask_TT.masked_fill_(~visible_TT, torch.finfo(dtype).min)
        return {"attention_mask": mask_TT[None, None], "position_ids": position_T[None]}
