"""The tap: observes every multiplication of activations with a weight of the resident block.

Inside `with Tap(...)`, each `F.linear`, `addmm` and `matmul` is matched by the address of its
second operand. `nn.Linear`, GPT-2's `Conv1D` (stored `[in, out]`), Falcon's `x @ W.T` and an
expert's slice of a fused parameter are thereby one case, and input norms, gram matrices and
per-sample gradients are all computed from what the tap reports.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowmem_gblm.errors import UnsupportedModel

# The number of a module with modules of its own, as in experts.3.up_proj.weight.
_EXPERT = re.compile(r"\.\d+\.(?=.+\.)")
_LISTED = 4


@dataclass(frozen=True, kw_only=True)
class MatmulWeight:
    """A matrix that a block multiplies activations with.

    Attributes:
        parameter: Name of the parameter inside the block.
        expert: Index into the first dimension of a fused 3-D parameter, or None.
        in_first: True if the matrix is stored `[in, out]`, False for `[out, in]`.
    """

    parameter: str
    expert: int | None
    in_first: bool

    def stored(self, block: nn.Module) -> Tensor:
        """Return the matrix inside the block's parameter, 2-D, as stored."""
        parameter = block.get_parameter(self.parameter).data
        return parameter if self.expert is None else parameter[self.expert]

    def __str__(self) -> str:
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """A multiplication: `out_TO` is `input_TI` times the slot's matrix, plus perhaps a bias.

    Attributes:
        input: The activations as the module passed them, [..., in].
        input_TI: `input`, flattened to 2-D and detached from the graph.
        out: The result, [..., out], still in the graph.
    """

    slot: MatmulWeight
    input: Tensor
    input_TI: Tensor
    out: Tensor


class Observer(Protocol):
    """An observer of the multiplications that a tap reports."""

    def observe(self, product: Matmul) -> None:
        """Take one multiplication; called in the order of the forward pass."""


class Tap(TorchFunctionMode):
    """A mode that reports the multiplications of one block with `slots` to its observers."""

    def __init__(
        self, block: nn.Module, slots: Iterable[MatmulWeight], observers: Sequence[Observer]
    ) -> None:
        super().__init__()
        self._observers = observers
        self._unseen = set(slots)
        stored = {slot: slot.stored(block) for slot in self._unseen}
        self._slots = {matrix.data_ptr(): slot for slot, matrix in stored.items()}
        self._sizes = {slot: matrix.numel() for slot, matrix in stored.items()}
        self._seen: list[MatmulWeight] = []
        self._skipped: MatmulWeight | None = None

    def __enter__(self) -> Self:
        self._seen.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pair = operands(func, args, kwargs)
        slot = None if pair is None else self._slots.get(pair[1].data_ptr())
        if pair is None or slot is None:
            return func(*args, **kwargs)
        skips = slot == self._skipped
        out = _Skipped.apply(*pair) if skips else func(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._match(slot, *pair, out)
        return out

    @property
    def last(self) -> MatmulWeight | None:
        """Return the slot of the last product of a forward, if it is the same for all samples.

        It is taken to be the same if every matrix, slices for experts aside, was seen once.
        """
        seen = [slot for slot in self._seen if slot.expert is None]
        alone = {slot for slot in self._sizes if slot.expert is None}
        if not seen or seen[-1] != self._seen[-1] or len(seen) != len(alone) or set(seen) != alone:
            return None
        return seen[-1]

    def skip(self, slot: MatmulWeight | None) -> None:
        """Stop computing the last product of a block: its output is NaN, its gradient as before."""
        self._skipped = slot

    def check_all_seen(self) -> None:
        """Raise `UnsupportedModel` if a matrix is `never_seen`."""
        unseen = self.never_seen
        if unseen:
            listed = ", ".join(unseen[:_LISTED]) + (", …" if len(unseen) > _LISTED else "")
            raise UnsupportedModel(
                f"the block never multiplied activations with {listed}: its forward pass uses an "
                f"operation that is not followed here"
            )

    @property
    def never_seen(self) -> list[str]:
        """Return parameters whose matrices were never seen, nor those of a like expert."""
        seen = {_kind(slot) for slot in self._slots.values() if slot not in self._unseen}
        return sorted({slot.parameter for slot in self._unseen if _kind(slot) not in seen})

    def _match(self, slot: MatmulWeight, input: Tensor, weight_IO: Tensor, out: Tensor) -> None:
        if self._seen and self._seen[-1] == self._skipped:
            raise UnsupportedModel(
                f"{slot} does not come in the same order in every sample: such a model is not "
                f"followed here"
            )
        if weight_IO.numel() != self._sizes[slot]:
            raise UnsupportedModel(f"{slot} is multiplied in parts")
        in_first = weight_IO.stride(-1) == 1 and weight_IO.shape[-1] > 1
        if in_first != slot.in_first and min(weight_IO.shape) > 1:
            raise UnsupportedModel(f"{slot} is multiplied the other way round than expected")
        self._unseen.discard(slot)
        self._seen.append(slot)
        input_TI = input.detach().reshape(-1, input.shape[-1])
        product = Matmul(slot=slot, input=input, input_TI=input_TI, out=out)
        for observer in self._observers:
            observer.observe(product)


def _kind(slot: MatmulWeight) -> str:
    """Return what alike experts have in common: an expert without tokens may still be supported."""
    return _EXPERT.sub(".*.", slot.parameter)


class _Skipped(torch.autograd.Function):
    """A product that is not computed; only its gradient is."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_IO: Tensor) -> Tensor:
        ctx.save_for_backward(weight_IO)
        return input.new_full((*input.shape[:-1], weight_IO.shape[1]), torch.nan)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight_IO,) = ctx.saved_tensors
        return gradients[0] @ weight_IO.mT, None


def operands(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return activations and the matrix `[in, out]` that `func` multiplies; None if it does not."""
    if func is nn.functional.linear:
        given = [*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)]
        return given[0], given[1].mT
    if func in _ADDMM:
        given = [*args, *(kwargs[name] for name in ("mat1", "mat2") if name in kwargs)]
        return given[1], given[2]
    if func in _MATMUL and isinstance(args[1], Tensor) and args[1].ndim == 2:
        return args[0], args[1]
    return None


_ADDMM = {torch.addmm, Tensor.addmm}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
