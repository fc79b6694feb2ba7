"""What a statistic declares; the plan, the sweeps and the pruner know no statistic by its name."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.sweeps.statistics.finite import are_finite

Axis = Literal["out", "in"] | int


class Statistic(ABC):
    """A sum over calibration samples for every matrix of one resident block, float32.

    Attributes:
        name: The name in the `needs` of methods.
        axes: The dimensions of the result: "out" and "in" of the matrix, in this order, or numbers.
        result_is_sum: Whether the result takes no memory beside the sum.
        shares_inputs: Whether matrices that are multiplied with one tensor share one sum.
    """

    name: ClassVar[str]
    axes: ClassVar[tuple[Axis, ...]]
    shares_inputs: ClassVar[bool] = False
    result_is_sum: ClassVar[bool] = False

    def __init__(self) -> None:
        self._sums: dict[MatmulWeight, Tensor] = {}

    @classmethod
    def per_output(cls) -> bool:
        """Return whether the result has a row for every output, and not for the inputs alone."""
        return cls.axes[:1] == ("out",)

    @classmethod
    def shape(cls, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of the result for a matrix [out, in]."""
        sizes = {"out": out_features, "in": in_features}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in cls.axes)

    @classmethod
    def flops_per_token(cls, out_features: int, in_features: int) -> int:
        """Return the FLOPs that a matrix [out, in] takes for every token; 0 where they are few."""
        return 0

    @abstractmethod
    def observe(self, matmul: Matmul) -> None:
        """Take in a multiplication of the sample under way."""

    @abstractmethod
    def finish_sample(self) -> None:
        """Take note that a sample has passed."""

    def sums(self) -> Mapping[MatmulWeight, Tensor]:
        """Return what has been added up over samples: what several processes would add up."""
        return self._sums

    def is_finite(self) -> bool:
        """Return whether no sample so far was NaN or infinite."""
        return are_finite(self.sums().values())

    @abstractmethod
    def result(self, matrix: MatmulWeight) -> Tensor | None:
        """Return the statistic of a matrix, float32; None for an expert that saw no token."""


class Measured(Protocol):
    """A statistic of activations that is complete: measured now, or by an earlier run."""

    @property
    def name(self) -> str:
        """Return the name of the statistic."""

    def part(self, weight: PrunableWeight) -> Tensor | None:
        """Return what belongs to a matrix on disk, float32; None without a token."""


class ActivationStatistic(Statistic):
    """A statistic that the forward pass gives, averaged over `nsamples`."""

    def __init__(self, nsamples: int) -> None:
        super().__init__()
        self._nsamples = nsamples
        # The last input and what was made of it, for matrices that are multiplied with one tensor.
        self._last: tuple[Tensor, Any] | None = None

    def finish_sample(self) -> None:
        """Release the last input."""
        self._last = None

    def part(self, weight: PrunableWeight) -> Tensor | None:
        """Return the part of a result that belongs to a matrix on disk; None without a token."""
        result = self.result(weight.slot)
        if result is None:
            return None
        parts = {"out": weight.outputs, "in": weight.inputs}
        cut = result[tuple(slice(None) if isinstance(a, int) else parts[a] for a in self.axes)]
        expected = self.shape(weight.out_features, weight.in_features)
        assert tuple(cut.shape) == expected, (
            f"the statistic {self.name!r} is {list(cut.shape)} for {weight}, its `axes` say "
            f"{list(expected)}"
        )
        return cut


class GradientStatistic(Statistic):
    """A statistic of the gradients of single samples: a number for every weight.

    `result` moves the numbers out, in the shape in which the matrix is stored.

    Args:
        scale: The factor of the loss, a power of two that is divided out.
        matrices: Which matrices; None for all.

    Attributes:
        boost: How much less the loss of the current sample was multiplied; a power of two.
    """

    axes = ("out", "in")

    def __init__(
        self, scale: float = 1.0, matrices: Collection[MatmulWeight] | None = None
    ) -> None:
        super().__init__()
        self.boost = 1.0
        self._scale = scale
        self._wanted = None if matrices is None else set(matrices)

    def results(self) -> dict[MatmulWeight, Tensor]:
        """Return the statistic of every matrix that saw a token; nothing stays here."""
        found = {matrix: self.result(matrix) for matrix in list(self.sums())}
        return {matrix: values for matrix, values in found.items() if values is not None}
