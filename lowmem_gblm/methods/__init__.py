"""Pruning methods: one file each, found by its name.

A method file defines `METHOD`, a `Method` that says which statistics it needs and how it decides.
`lowmem_gblm/methods/wanda.py` is the shortest complete example; dropping such a file here is all
it takes to add a method.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lowmem_gblm.errors import NonFiniteError, RequestError
from lowmem_gblm.methods.masks import Group, Pattern, keep_mask

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of a matrix that are decided at once where rows can be taken by themselves: on a CPU, what
# stays in its cache.
AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}

# Modules beside the methods.
_NO_METHODS = {"masks"}

StatisticName = Literal["input_norm", "gradient", "gram"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What was measured for one matrix; None where the method did not ask for it.

    Attributes:
        input_norm: float32 [in], `sqrt((1/N) sum_n sum_t x^2)`.
        gradient: float32 [out, in], `sum_n |g_n|` (l1) or `sqrt(sum_n g_n^2)` (l2).
        gram: float32 [in, in], `(2/N) sum_n x_n^T x_n`.
    """

    input_norm: Tensor | None = None
    gradient: Tensor | None = None
    gram: Tensor | None = None

    def of_rows(self, rows: slice) -> Statistics:
        """Those that belong to some of the outputs; what belongs to the inputs stays whole."""
        gradient = None if self.gradient is None else self.gradient[rows]
        return replace(self, gradient=gradient)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a method decided for one matrix.

    Attributes:
        keep: bool [out, in], True where the weight stays.
        weight: float32 [out, in] with new values for the kept weights, or None where the kept
            weights stay as they are.
        note: A sentence for the record of the run, or None.
    """

    keep: Tensor
    weight: Tensor | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to prune one matrix.

    Attributes:
        name: As typed on the command line; the name of the file.
        title: The score or idea, in one line.
        paper: Where it comes from.
        needs: Statistics that must be measured first; which passes run follows from them.
        group: What is compared with what where the pattern is unstructured.
        decide: `(weight [out, in], statistics, pattern, alpha) -> Decision`; the weight comes in
            the dtype of the checkpoint and is not to be modified.
        updates_weights: Whether kept weights change.
        bytes_per_weight: Most memory that `decide` takes for every weight of the matrix, its result
            included; the plan counts on it.
        bytes_per_gram_entry: The same for every entry of the gram matrix.
    """

    name: str
    title: str
    paper: str
    needs: tuple[StatisticName, ...]
    group: Group | Literal["columns"]
    decide: Callable[[Tensor, Statistics, Pattern, float], Decision]
    updates_weights: bool = False
    bytes_per_weight: float = 32
    bytes_per_gram_entry: float = 0


def method_names() -> list[str]:
    """Names of all methods, without importing any."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(found - _NO_METHODS)


def check_method_name(name: str) -> None:
    """Raise `RequestError` if there is no such method."""
    if name not in method_names():
        raise RequestError(f"unknown method {name!r}: choose one of {', '.join(method_names())}")


def find_method(name: str) -> Method:
    """Import the method of that name.

    Raises:
        RequestError: There is none.
    """
    check_method_name(name)
    method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def by_score(
    score: Callable[[Tensor, Statistics, float], Tensor], group: Group, *, rowwise: bool = False
) -> Callable[[Tensor, Statistics, Pattern, float], Decision]:
    """Turn a score `(weight float32 [out, in], statistics, alpha) -> [out, in]` into a `decide`.

    A row whose scores are all zero (an expert that saw no token) is ranked by `abs(weight)`.

    Args:
        score: May modify nothing.
        group: What is compared with what where the pattern is unstructured.
        rowwise: Whether the scores of a row follow from that row alone (and from the statistics of
            the inputs). A few rows are then decided at a time, which takes less memory and time.

    Raises (when called):
        NonFiniteError: A score is NaN or infinite.
    """

    def decide(
        weight_OI: Tensor, statistics: Statistics, pattern: Pattern, alpha: float
    ) -> Decision:
        rows = weight_OI.shape[0]
        if rowwise and group == "row":
            rows = max(1, AT_ONCE[weight_OI.device.type] // weight_OI.shape[1])
        keeps = [
            _keep(score, weight_OI[part].float(), statistics.of_rows(part), pattern, group, alpha)
            for part in (slice(start, start + rows) for start in range(0, len(weight_OI), rows))
        ]
        return Decision(keep=keeps[0] if len(keeps) == 1 else _joined(keeps))

    return decide


def _keep(
    score: Callable[[Tensor, Statistics, float], Tensor],
    weight_OI: Tensor,
    statistics: Statistics,
    pattern: Pattern,
    group: Group,
    alpha: float,
) -> Tensor:
    score_OI = score(weight_OI, statistics, alpha)
    least_O, most_O = score_OI.aminmax(dim=1)
    if not bool((least_O.isfinite() & most_O.isfinite()).all()):
        raise NonFiniteError(
            f"{int((~score_OI.isfinite()).sum())} of {score_OI.numel()} scores are not finite"
        )
    silent_O = (least_O == 0) & (most_O == 0)
    if bool(silent_O.any()):
        score_OI[silent_O] = weight_OI[silent_O].abs()
    return keep_mask(score_OI, pattern, group)


def _joined(keeps: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(keeps)


def require(statistic: Tensor | None) -> Tensor:
    """The statistic itself; that it was measured is the contract of `Method.needs`."""
    assert statistic is not None, "a method reads a statistic that its `needs` does not name"
    return statistic
