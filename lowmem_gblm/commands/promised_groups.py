"""The promises of `pruning.json` about single comparison groups, as `verify` reads them.

Nothing here calls the code that made the masks: whether the counts of the record agree with its
pattern is calculated independently.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor

from lowmem_gblm.storage.checkpoint.file_access import RECORD


class _Asked(NamedTuple):
    """A pattern as it is recorded."""

    sparsity: Fraction
    text: str
    n_of_m: tuple[int, int] | None


@dataclass(frozen=True)
class PromisedGroups:
    """Groups of `rows` x `columns` weights, `repeat` of them side by side in a matrix [out, in].

    At least `removed` weights are zero in each group.
    """

    rows: int
    columns: int
    repeat: int
    removed: int

    def __post_init__(self) -> None:
        numbers = (self.rows, self.columns, self.repeat, self.removed)
        valid = all(type(number) is int for number in numbers) and min(numbers[:3]) > 0
        if not valid or not 0 <= self.removed <= self.size:
            raise ValueError(f"not a comparison group: {self}")

    @property
    def size(self) -> int:
        """Return the number of weights of a group."""
        return self.rows * self.columns

    def label(self, in_features: int) -> str:
        """Return what the groups are called in a sentence."""
        if self.rows == 1:
            return "rows" if self.columns == in_features else f"groups of {self.columns}"
        return "matrices" if self.columns == in_features else "column blocks"


def promised_groups(described: Mapping[str, Any]) -> list[PromisedGroups]:
    """Return the groups of a tensor from its entry in the record.

    An entry that is not valid raises a ValueError, KeyError or TypeError.
    """
    found = [PromisedGroups(**one) for one in described["groups"]]
    out_features, in_features = _features(described)
    if sum(one.columns * one.repeat for one in found) != in_features:
        raise ValueError(f"its groups do not cover {in_features} inputs: {described}")
    if any(one.rows not in (1, out_features) for one in found):
        raise ValueError(f"its groups do not cover {out_features} outputs: {described}")
    return found


def cut(weight_RI: Tensor, groups: Sequence[PromisedGroups]) -> Iterator[tuple[str, Tensor, int]]:
    """Cut a tensor, [out, in] or [experts, out, in], into its comparison groups.

    Yields what the groups are called, their weights [groups, size], and the zeros promised in each.
    """
    matrices = weight_RI if weight_RI.ndim == 3 else weight_RI[None]
    start = 0
    for one in groups:
        width = one.columns * one.repeat
        part = matrices[..., start : start + width]
        parts = part.reshape(-1, one.rows, one.repeat, one.columns).transpose(1, 2)
        yield one.label(matrices.shape[-1]), parts.reshape(-1, one.size), one.removed
        start += width


def contradictions(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for every tensor whose groups are not those of the record's pattern.

    A pattern or sparsity that is not valid raises a ValueError.
    """
    by_glob = _patterns(record)
    for name, described in record["tensors"].items():
        asked = next((one for glob, one in by_glob.items() if fnmatchcase(name, glob)), None)
        if asked is None:
            yield f"{name} is pruned, and {RECORD} has no sparsity for it"
            continue
        groups = promised_groups(described)
        if asked.n_of_m is None:
            out_features, in_features = _features(described)
            rows = 1 if record["group"] == "row" else out_features
            fits = [
                one.rows == rows and one.removed == math.floor(one.size * asked.sparsity)
                for one in groups
            ]
            # Rows and matrices are not cut; only a method that says so has blocks of columns.
            fits.append(record["group"] == "columns" or groups[0].columns == in_features)
        else:
            fits = [_is_n_of_m(one, *asked.n_of_m, tail=one is groups[-1]) for one in groups]
        if not all(fits):
            yield (
                f"{name}: {RECORD} promises {groups[0].removed} zeros in every {groups[0].size} "
                f"weights of {groups[0].label(_features(described)[1])}, which is not the pattern "
                f"{asked.text} at a sparsity of {float(asked.sparsity):g} that it records"
            )


def _is_n_of_m(one: PromisedGroups, n: int, m: int, *, tail: bool) -> bool:
    """Return whether groups are those of N:M; a tail that M does not divide stays dense."""
    if one.columns == m:
        return (one.rows, one.removed) == (1, m - n)
    return tail and one.columns < m and (one.rows, one.repeat, one.removed) == (1, 1, 0)


def _patterns(record: Mapping[str, Any]) -> dict[str, _Asked]:
    """Return the patterns of a record by glob; of those that match a name the first counts."""
    sparsity, pattern = record["sparsity"], record["pattern"]
    if not isinstance(sparsity, dict):
        return {"*": _pattern(sparsity, pattern)}
    if list(sparsity) != list(pattern):
        raise ValueError(f"sparsity and pattern have other globs: {sparsity}, {pattern}")
    return {glob: _pattern(sparsity[glob], pattern[glob]) for glob in sparsity}


def _pattern(asked: Any, text: Any) -> _Asked:
    if not isinstance(asked, float):
        # A text may stand for a number of any length.
        raise ValueError(f"not a sparsity: {asked!r}")
    # The decimal that was asked, not the binary number next to it.
    sparsity = Fraction(str(asked))
    if not 0 < sparsity < 1:
        raise ValueError(f"not a sparsity: {sparsity}")
    if text == "unstructured":
        return _Asked(sparsity, text, None)
    n, m = (int(part) for part in text.split(":"))
    if not 0 < n < m or float(sparsity) != float(1 - Decimal(n) / Decimal(m)):
        raise ValueError(f"not a pattern: {text}")
    return _Asked(sparsity, text, (n, m))


def _features(described: Mapping[str, Any]) -> tuple[int, int]:
    """Return outputs and inputs of the matrices of a tensor."""
    rows, columns = described["shape"][-2:]
    return (columns, rows) if described["layout"] == "in,out" else (rows, columns)
