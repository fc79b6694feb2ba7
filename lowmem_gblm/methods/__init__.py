"""Pruning methods: one file each, found by its name.

A method file defines `METHOD`, a `Method` that says which statistics it needs, which options it has
and how it decides. `lowmem_gblm/methods/wanda.py` is the shortest complete example, `gblm.py` one
with options; a file in this folder is all it takes. Another package adds a method by an entry point
of the group `lowmem_gblm.methods`, whose value is a `METHOD`.

`--help` lists the options of all methods, so a method file imports torch where it computes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lowmem_gblm.errors import NonFiniteError, RequestError
from lowmem_gblm.extensions import extension_names, load_extension
from lowmem_gblm.methods.masks import Group, NofM, Pattern, keep_mask
from lowmem_gblm.options import NoOptions, options

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of a matrix that are decided at once where rows can be taken by themselves: on a CPU, what
# stays in its cache.
AT_ONCE, AT_ONCE_ON_GPU = 1 << 20, 1 << 24
# Their decisions about a weight are bits of one byte.
MOST_CANDIDATES = 8

# Modules beside the methods.
_NO_METHODS = {"masks"}

_EXTENSIONS = "lowmem_gblm.methods"

Value = TypeVar("Value")


class Statistics(dict[str, "Tensor"]):
    """The float32 statistics of one matrix [out, in], by the names that the method's `needs` gives.

    Those named in `per_output` have a row for every output; the others belong to the inputs.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        per_output: Collection[str] = (),
        derived: dict[object, Any] | None = None,
    ) -> None:
        super().__init__(values)
        self._per_output = frozenset(per_output)
        self._derived = {} if derived is None else derived

    def derived(self, name: str, compute: Callable[[Tensor], Value]) -> Value:
        """Return `compute` of a statistic; matrices that share the statistic share the result."""
        value = self[name]
        key = (name, compute, value.data_ptr(), value.shape)
        if key not in self._derived:
            # With the value: no other one may take its address while the result is kept.
            self._derived[key] = value, compute(value)
        found: Value = self._derived[key][1]
        return found

    def __missing__(self, name: str) -> Tensor:
        raise AssertionError(
            f"a method reads the statistic {name!r}, which its `needs` does not name"
        )

    def of_rows(self, rows: slice) -> Statistics:
        """Return the statistics of some outputs; what belongs to the inputs stays complete."""
        values = {
            name: value[rows] if name in self._per_output else value for name, value in self.items()
        }
        return Statistics(values, self._per_output)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision of a method for one matrix.

    Attributes:
        keep: bool [out, in], True where the weight stays.
        weight: float32 [out, in] with new values for the kept weights; None if they stay as they
            are.
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
        needs: Names of the statistics to measure first, or a function of the options that returns
            the names; which sweeps run follows from them.
        group: The comparison group where the pattern is unstructured.
        block_columns: Where `group` is "columns": the columns of a comparison group.
        decide: `(weight [out, in], statistics, pattern, options) -> Decision`; the weight comes in
            the dtype of the checkpoint and is not to be modified.
        options: A frozen dataclass whose fields are declared with `lowmem_gblm.options.option`; it
            checks its values in `__post_init__`.
        candidates: `(options, nsamples, seqlen) -> options to choose among` by the loss of held-out
            windows: at most `MOST_CANDIDATES`, none where the options leave nothing open. Not for
            a method that updates weights.
        updates_weights: Whether kept weights change.
        bytes_per_weight: Most memory that `decide` takes for every weight of the matrix, its result
            included; the plan counts on it.
        bytes_per_squared_input: The same for every entry of a matrix [in, in], on top.
        kept_per_squared_input: What `Statistics.derived` keeps for every entry of a matrix [in, in]
            until the block is pruned.
        flops_per_cubed_input: The FLOPs that an input shared by matrices takes, as a factor of in³.
        sweeps_columns: Whether columns are decided one after the other, which takes time for each.
    """

    name: str
    title: str
    paper: str
    needs: tuple[str, ...] | Callable[[Any], tuple[str, ...]]
    group: Group | Literal["columns"]
    block_columns: Callable[[Pattern], int] | None = None
    decide: Callable[[Tensor, Statistics, Pattern, Any], Decision]
    options: type[Any] = NoOptions
    candidates: Callable[[Any, int, int], Sequence[Any]] = lambda *asked: ()
    updates_weights: bool = False
    bytes_per_weight: float = 32
    bytes_per_squared_input: float = 0
    kept_per_squared_input: float = 0
    flops_per_cubed_input: float = 0
    sweeps_columns: bool = False

    def needs_with(self, options: Any) -> tuple[str, ...]:
        """Return the names of the statistics that are needed with these options."""
        return self.needs(options) if callable(self.needs) else self.needs

    def comparison_groups(
        self, pattern: Pattern, out_features: int, in_features: int
    ) -> list[dict[str, int]]:
        """Return the comparison groups of a matrix [out, in], from the first input to the last.

        Each has `rows` and `columns` (the last one may have fewer columns), `repeat`: how many lie
        side by side, and `removed`: how many weights of each are removed.
        """
        rows = 1 if self.group == "row" else out_features
        columns = self.block_columns(pattern) if self.block_columns else in_features
        if isinstance(pattern, NofM):
            rows, columns = 1, pattern.m
        whole, tail = divmod(in_features, columns)
        found = []
        for width, repeat in ((columns, whole), (tail, 1)):
            if width * repeat:
                removed = pattern.removed(rows * width)
                found.append({"rows": rows, "columns": width, "repeat": repeat, "removed": removed})
        return found


def method_names() -> list[str]:
    """Return the names of all methods, without importing any."""
    return sorted({*built_in_names(), *extension_names(_EXTENSIONS)})


def built_in_names() -> list[str]:
    """Return the names of the methods of this package, without importing any."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(found - _NO_METHODS)


def find_method(name: str) -> Method:
    """Import the method of that name, our own first; raise `RequestError` if none can be used."""
    if name in built_in_names():
        method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
        return method
    expected = "lowmem_gblm.methods.Method of that name with a dataclass of options"
    extension: Method | None = load_extension(_EXTENSIONS, name, "method", _is_method, expected)
    if extension is None:
        known = method_names()
        nearest = get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise RequestError(f"unknown method {name!r}: choose one of {', '.join(known)}{hint}")
    return extension


def _is_method(one: Any) -> bool:
    return isinstance(one, Method) and is_dataclass(one.options)


def usable_methods(
    named: Collection[str] | None = None, report: Callable[[str], object] = len
) -> list[str]:
    """Return the names of our own methods and of those of other packages that can be imported.

    Only methods among `named` are imported; None stands for all. `report` is told why one failed.
    """
    names = built_in_names()
    others = set(extension_names(_EXTENSIONS)).difference(names)
    for name in others if named is None else others & set(named):
        try:
            find_method(name)
        except RequestError as error:
            report(str(error))
        else:
            names.append(name)
    return sorted(names)


def option_owners(names: Iterable[str]) -> dict[str, list[str]]:
    """Return for every option of these methods the names of the methods that have it."""
    found: dict[str, list[str]] = {}
    for name in names:
        for one in options(find_method(name).options):
            found.setdefault(one.name, []).append(name)
    return found


def by_score(
    score: Callable[[Tensor, Statistics, Any], Tensor], group: Group, *, rowwise: bool = False
) -> Callable[[Tensor, Statistics, Pattern, Any], Decision]:
    """Turn a score `(weight float32 [out, in], statistics, options) -> [out, in]` into a `decide`.

    The score modifies nothing. A row whose scores are all zero (an expert that saw no token) is
    ranked by `abs(weight)`; a score that is NaN or infinite raises a NonFiniteError. If `rowwise`,
    the scores of a row follow from that row alone (and from the statistics of the inputs): a few
    rows are then decided at a time, which takes less memory and time.
    """

    def keep(weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: Any) -> Tensor:
        score_OI = score(weight_OI, statistics, options)
        least_O, most_O = score_OI.aminmax(dim=1)
        if not bool((least_O.isfinite() & most_O.isfinite()).all()):
            count = int((~score_OI.isfinite()).sum())
            raise NonFiniteError(f"{count} of {score_OI.numel()} scores are not finite")
        silent_O = (least_O == 0) & (most_O == 0)
        if bool(silent_O.any()):
            score_OI[silent_O] = weight_OI[silent_O].abs()
        return keep_mask(score_OI, pattern, group)

    def decide(
        weight_OI: Tensor, statistics: Statistics, pattern: Pattern, options: Any
    ) -> Decision:
        import torch

        rows = weight_OI.shape[0]
        if rowwise and group == "row":
            at_once = AT_ONCE if weight_OI.is_cpu else AT_ONCE_ON_GPU
            rows = max(1, at_once // weight_OI.shape[1])
        keeps = [
            keep(weight_OI[part].float(), statistics.of_rows(part), pattern, options)
            for part in (slice(start, start + rows) for start in range(0, len(weight_OI), rows))
        ]
        return Decision(keep=keeps[0] if len(keeps) == 1 else torch.cat(keeps))

    return decide
