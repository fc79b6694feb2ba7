"""Statistics of a resident block, gathered at its tap: one file each, found by its name.

A statistic observes the multiplications of one calibration sample after the other, then answers for
each matrix. Accumulators are float32, on the device of the block. A file in this folder adds a
statistic; so does an entry point of the group `lowmem_gblm.statistics`, whose value is the class.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lowmem_gblm.errors import RequestError
from lowmem_gblm.extensions import extension_names, load_extension
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic, GradientStatistic

_EXTENSIONS = "lowmem_gblm.statistics"

StatisticClass = type[ActivationStatistic] | type[GradientStatistic]


@dataclass(frozen=True, kw_only=True)
class NeededStatistics:
    """The statistics that a method needs: of a forward pass, and at most one of a backward pass."""

    activations: tuple[type[ActivationStatistic], ...] = ()
    gradient: type[GradientStatistic] | None = None

    @property
    def classes(self) -> tuple[StatisticClass, ...]:
        """Return all of them."""
        return (*self.activations, *([] if self.gradient is None else [self.gradient]))

    @property
    def names(self) -> list[str]:
        """Return the names of all of them."""
        return [one.name for one in self.classes]


def needed_statistics(names: Iterable[str]) -> NeededStatistics:
    """Return the statistics of these names, of which at most one may be of gradients."""
    found = [find_statistic(name) for name in dict.fromkeys(names)]
    gradients = [one for one in found if issubclass(one, GradientStatistic)]
    if len(gradients) > 1:
        raise RequestError(
            f"a method may need one statistic of gradients; this one needs "
            f"{' and '.join(one.name for one in gradients)}"
        )
    return NeededStatistics(
        activations=tuple(one for one in found if issubclass(one, ActivationStatistic)),
        gradient=gradients[0] if gradients else None,
    )


def find_statistic(name: str) -> StatisticClass:
    """Import the statistic of that name; this package comes before other packages."""
    if name in _built_in():
        return _built_in()[name]
    expected = "ActivationStatistic or GradientStatistic of that name"
    extension: StatisticClass | None = load_extension(
        _EXTENSIONS, name, "statistic", _is_statistic, expected
    )
    if extension is None:
        known = sorted({*_built_in(), *extension_names(_EXTENSIONS)})
        raise RequestError(f"unknown statistic {name!r}: there are {', '.join(known)}")
    return extension


@cache
def _built_in() -> dict[str, StatisticClass]:
    """Return the statistics of the files beside this one, by name."""
    found: dict[str, StatisticClass] = {}
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        found |= {one.name: one for one in content.values() if _is_statistic(one)}
    return found


def _is_statistic(one: Any) -> bool:
    """Return whether something is the class of a statistic, and not a base of some."""
    if not isinstance(one, type) or not issubclass(one, (ActivationStatistic, GradientStatistic)):
        return False
    return not inspect.isabstract(one) and hasattr(one, "name") and hasattr(one, "axes")
