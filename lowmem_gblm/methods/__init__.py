"""Pruning methods: one file each, found by its name.

A method file defines `METHOD`, a `Method` that says which statistics it needs and how it decides.
`lowmem_gblm/methods/wanda.py` is the shortest complete example; dropping such a file here is all
it takes to add a method.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lowmem_gblm.errors import NonFiniteError, RequestError
from lowmem_gblm.masks import Group, Pattern, keep_mask

if TYPE_CHECKING:
    from torch import Tensor

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
        decide: `(weight [out, in] float32, statistics, pattern, alpha) -> Decision`.
        updates_weights: Whether kept weights change.
    """

    name: str
    title: str
    paper: str
    needs: tuple[StatisticName, ...]
    group: Group | Literal["columns"]
    decide: Callable[[Tensor, Statistics, Pattern, float], Decision]
    updates_weights: bool = False


def method_names() -> list[str]:
    """Names of all methods, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


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
    score: Callable[[Tensor, Statistics, float], Tensor], group: Group
) -> Callable[[Tensor, Statistics, Pattern, float], Decision]:
    """Turn a score `(weight [out, in], statistics, alpha) -> [out, in]` into a `decide`.

    A row whose scores are all zero (an expert that saw no token) is ranked by `abs(weight)`.

    Raises (when called):
        NonFiniteError: A score is NaN or infinite.
    """

    def decide(
        weight_OI: Tensor, statistics: Statistics, pattern: Pattern, alpha: float
    ) -> Decision:
        score_OI = score(weight_OI, statistics, alpha)
        least_O, most_O = score_OI.aminmax(dim=1)
        if not bool((least_O.isfinite() & most_O.isfinite()).all()):
            raise NonFiniteError(
                f"{int((~score_OI.isfinite()).sum())} of {score_OI.numel()} scores are not finite"
            )
        silent_O = (least_O == 0) & (most_O == 0)
        if bool(silent_O.any()):
            score_OI[silent_O] = weight_OI[silent_O].abs()
        return Decision(keep=keep_mask(score_OI, pattern, group))

    return decide


def require(statistic: Tensor | None) -> Tensor:
    """The statistic itself; that it was measured is the contract of `Method.needs`."""
    assert statistic is not None, "a method reads a statistic that its `needs` does not name"
    return statistic
