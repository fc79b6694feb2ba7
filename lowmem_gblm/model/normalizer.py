"""How much longer a tokenizer may make a text before it looks for tokens.

A normalizer is a list of replacements from tokenizer.json, and a stranger's may double a text forty
times: the process would die of it without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

_MOST = 64
# What a piece may grow to while it is tried: some hundred MiB.
_FEASIBLE = 1 << 17
_PIECE = 64


class Growth:
    """Watches over the normalizer of a tokenizer of transformers.

    Args:
        tokenizer: One without a normalizer, or in Python alone, needs no watching.

    Raises:
        ValueError: It cannot even be tried.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer: Any = getattr(backend, "normalizer", None)
        worst = 1.0
        if self._normalizer is not None:
            worst = _worst(json.loads(self._normalizer.__getstate__()))
        if worst > _FEASIBLE:
            raise ValueError(f"its normalizer may make a text {worst:.3g} times longer")
        self._harmless = worst <= _MOST

    def check(self, text: str) -> None:
        """Raise `ValueError` if a piece of the text becomes more than 64 times longer."""
        if self._harmless:
            return
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            longer = len(self._normalizer.normalize_str(piece)) / len(piece)
            if longer > _MOST:
                raise ValueError(
                    f"its normalizer makes a text {longer:.3g} times longer, expected at most "
                    f"{_MOST} times"
                )


def _worst(normalizer: Mapping[str, Any]) -> float:
    """How many times longer a piece may become at most."""
    kind = normalizer["type"]
    if kind == "Sequence":
        return prod(_worst(one) for one in normalizer["normalizers"])
    if kind == "Prepend":
        return 1 + len(normalizer["prepend"]) / _PIECE
    if kind != "Replace":
        return 1
    content, pattern = normalizer["content"], normalizer["pattern"].get("String")
    # An expression may match nothing, before every character.
    return max(1, len(content) / len(pattern)) if pattern else len(content) + 1
