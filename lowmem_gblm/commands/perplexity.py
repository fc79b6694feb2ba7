"""The perplexity of a text: its windows as rows to be scored, and the result from their scores."""

import math
from collections.abc import Mapping
from typing import Any

from lowmem_gblm.commands.calibration import bos_of_windows, evaluation_windows, resolve_bos
from lowmem_gblm.commands.request import EvalRequest, resolve_seqlen
from lowmem_gblm.commands.texts import open_source
from lowmem_gblm.errors import NonFiniteError
from lowmem_gblm.model.open_model import OpenModel
from lowmem_gblm.model.tokenizer import load_tokenizer
from lowmem_gblm.sweeps.batches import Row, Score


class TextPerplexity:
    """`exp` of the mean over windows of the mean next-token cross-entropy.

    The text is tokenized once and cut into windows of `seqlen` that do not overlap; the tail is
    dropped. The window is part of the number: perplexities of different windows do not compare.

    Attributes:
        rows: A row for every window; its labels are the next tokens.
    """

    def __init__(self, request: EvalRequest, opened: OpenModel) -> None:
        self._text = request.evaluation_text
        self._seqlen = resolve_seqlen(request.seqlen, opened.positions)
        self._bos = resolve_bos(request.bos, opened.model_type)
        tokenizer = load_tokenizer(opened.folder, trust_remote_code=request.trust_remote_code)
        windows_NT = evaluation_windows(
            open_source(self._text, "evaluation", request.text_column),
            tokenizer,
            seqlen=self._seqlen,
            windows=request.windows,
            bos=bos_of_windows(request.bos, opened.model_type, tokenizer.bos),
        )
        self.rows = [Row.of(tokens_T, tokens_T[1:], first=0) for tokens_T in windows_NT.numpy()]

    def result(self, scores: Mapping[Row, Score]) -> dict[str, Any]:
        """Return `text`, `seqlen`, `windows`, `bos` and `perplexity`.

        Raises:
            NonFiniteError: The loss of a window is NaN or infinite.
        """
        losses = [-scores[row].log_probability / (self._seqlen - 1) for row in self.rows]
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            first = next(n for n, loss in enumerate(losses) if not math.isfinite(loss))
            raise NonFiniteError(f"window {first} of {self._text} has the loss {losses[first]}")
        return {
            "text": self._text,
            "seqlen": self._seqlen,
            "windows": len(self.rows),
            "bos": self._bos,
            "perplexity": math.exp(mean),
        }
