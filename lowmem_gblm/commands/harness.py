"""Streamed models for lm-evaluation-harness; the only module besides `tasks` that imports it.

`python -m lowmem_gblm.commands.harness` is its command line, which then knows the model:
`run --model lowmem-gblm --model_args pretrained=MODEL,cpu_memory=24GiB --tasks boolq`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from lowmem_gblm.commands.request import EvalRequest, resolve_seqlen
from lowmem_gblm.commands.scoring import model_to_score, score
from lowmem_gblm.errors import RequestError
from lowmem_gblm.model.open_model import OpenModel
from lowmem_gblm.model.tokenizer import open_tokenizer
from lowmem_gblm.options import options
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.sweeps.batches import Row, Score

_NOTED = Score(0.0, False)


class StreamedLM(HFLM):  # type: ignore[misc]
    """The harness's own `hf` model, except that scores come from a sweep instead of a forward pass.

    Special tokens, windows of long texts and chat templates are those of `hf`, as the code is.

    Attributes:
        scores: The scores of rows; those of `rows` must be here before a request is answered.
    """

    def __init__(self, opened: OpenModel, request: EvalRequest) -> None:
        trusted, max_length = request.trust_remote_code, request.seqlen
        tokenizer = open_tokenizer(opened.folder, trust_remote_code=trusted)
        if max_length is not None:
            max_length = resolve_seqlen(max_length, opened.positions)
        super().__init__(opened.streamed.model, tokenizer=tokenizer, max_length=max_length)
        self.scores: dict[Row, Score] = {}
        self._noted: dict[Row, None] | None = None

    def rows(self, requests: Sequence[Instance]) -> list[Row]:
        """Return the rows that requests of any type need and that have no score."""
        self._noted = {}
        self._answers(requests)
        noted, self._noted = self._noted, None
        return list(noted)

    def _answers(self, requests: Sequence[Instance]) -> list[Any]:
        """Return the answers to requests; one after the other, as lists of tokens are large."""
        answers = {
            "loglikelihood": super().loglikelihood,
            "loglikelihood_rolling": super().loglikelihood_rolling,
            "generate_until": self.generate_until,
        }
        return [
            answers[request.request_type]([request], disable_tqdm=True)[0] for request in requests
        ]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return log-probability of every continuation, and whether it is the likeliest."""
        return self._answers(requests)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[Any]:
        """Return the log-probability of every text."""
        return self._answers(requests)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raise `RequestError`: every token would take a sweep."""
        raise RequestError(
            f"the task {requests[0].task_name} lets the model write text, and a streamed model is "
            f"read once for every token: choose tasks with given answers, or use lm_eval --model hf"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[Score]:
        """Return the score of every continuation of a context, both as tokens; or note the row."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        if self._noted is None:
            return [self.scores[row] for row in rows]
        self._noted |= dict.fromkeys(row for row in rows if row not in self.scores)
        return [_NOTED] * len(rows)

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """Return what the model reads: as much of the end as it has positions for."""
        if not 0 < len(continuation) <= self.max_length:
            raise RequestError(
                f"a task has an answer of {len(continuation)} tokens, and the model reads "
                f"{self.max_length} at most: leave the task out"
            )
        tokens = [*context, *continuation][-(self.max_length + 1) : -1]
        return Row.of(tokens, continuation, first=len(tokens) - len(continuation))


@register_model("lowmem-gblm")
class SweepingLM(StreamedLM):
    """A streamed model that sweeps when it is asked: `lm_eval --model lowmem-gblm`.

    Args:
        pretrained: Folder or Hub id.
        batch_size, max_batch_size: Ignored: what fits the memory is done at once.
        max_length: The `seqlen` of `EvalRequest`.
        resources: Fields of `Resources`, as typed.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: object = None,
        max_batch_size: object = None,
        max_length: int | None = None,
        **resources: Any,
    ) -> None:
        self._request = EvalRequest(model=pretrained, seqlen=max_length, **_parsed(resources))
        # Until the process ends: the harness does not say when it is done.
        self._opened = ExitStack().enter_context(model_to_score(pretrained, self._request))
        super().__init__(self._opened, self._request)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Return what `StreamedLM` does, after a sweep."""
        self._sweep(requests)
        return super().loglikelihood(requests)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[Any]:
        """Return what `StreamedLM` does, after a sweep."""
        self._sweep(requests)
        return super().loglikelihood_rolling(requests)

    def _sweep(self, requests: Sequence[Instance]) -> None:
        rows = self.rows(requests)
        if rows:
            self.scores |= score(self._opened, self._request, rows, packed=True).scores


def _parsed(typed: dict[str, Any]) -> dict[str, Any]:
    """Return options of `Resources` from what the harness has made of `--model_args`."""
    parse = {one.name: one.metadata["parse"] for one in options(Resources)}
    return {
        name: parse[name](value) if isinstance(value, str) and name in parse else value
        for name, value in typed.items()
    }


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
