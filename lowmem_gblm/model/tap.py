"""The tap: sees every multiplication of activations with a weight of the resident block.

Inside `with Tap(...)`, each `F.linear`, `addmm` and `matmul` is matched by the address of its
second operand. `nn.Linear`, GPT-2's `Conv1D` (stored `[in, out]`), Falcon's `x @ W.T` and an
expert's slice of a fused parameter are thereby one case, and input norms, gram matrices and
per-sample gradients all hang on this one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowmem_gblm.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One matrix that a block multiplies activations with.

    Attributes:
        parameter: Name of the parameter inside the block.
        expert: Index into the first dimension of a fused 3-D parameter, or None.
        in_first: True where the matrix is stored `[in, out]`, False for `[out, in]`.
    """

    parameter: str
    expert: int | None
    in_first: bool

    def stored(self, block: nn.Module) -> Tensor:
        """The matrix inside the block's parameter, 2-D, as stored."""
        parameter = block.get_parameter(self.parameter).data
        return parameter if self.expert is None else parameter[self.expert]

    def __str__(self) -> str:
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"


@dataclass(frozen=True, kw_only=True)
class Product:
    """One multiplication: `out_TO` is `input_TI` times the slot's matrix, plus perhaps a bias.

    Attributes:
        slot: The matrix.
        input: The activations as the module passed them, [..., in].
        input_TI: The same, flattened to 2-D and detached from the graph.
        out: The result, [..., out], still in the graph.
    """

    slot: Slot
    input: Tensor
    input_TI: Tensor
    out: Tensor


class Observer(Protocol):
    """What may hang on a tap."""

    def observe(self, product: Product) -> None:
        """Called at every multiplication, in the order of the forward pass."""


class Tap(TorchFunctionMode):
    """Reports the multiplications of one resident block to its observers.

    Args:
        block: The resident block: its parameters hold data.
        slots: The matrices to look for.
        observers: Who is told.
    """

    def __init__(
        self, block: nn.Module, slots: Iterable[Slot], observers: Sequence[Observer]
    ) -> None:
        super().__init__()
        self._observers = observers
        self._unseen = set(slots)
        stored = {slot: slot.stored(block) for slot in self._unseen}
        self._slots = {matrix.data_ptr(): slot for slot, matrix in stored.items()}
        self._sizes = {slot: matrix.numel() for slot, matrix in stored.items()}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = _operands(func, args, kwargs or {})
        if operands is not None:
            self._match(*operands, out)
        return out

    def check_all_seen(self) -> None:
        """Raise `UnsupportedModel` if a matrix, or every expert of a parameter, was never met."""
        met = {slot.parameter for slot in self._slots.values() if slot not in self._unseen}
        unseen = sorted({slot.parameter for slot in self._unseen} - met)
        if unseen:
            raise UnsupportedModel(
                f"the block never multiplied activations with {', '.join(unseen)}: its forward "
                f"pass uses an operation that is not followed here"
            )

    def _match(self, input: Tensor, weight_IO: Tensor, out: Tensor) -> None:
        slot = self._slots.get(weight_IO.data_ptr())
        if slot is None:
            return
        if weight_IO.numel() != self._sizes[slot]:
            raise UnsupportedModel(f"{slot} is multiplied in parts")
        in_first = weight_IO.stride(-1) == 1 and weight_IO.shape[-1] > 1
        if in_first != slot.in_first and min(weight_IO.shape) > 1:
            raise UnsupportedModel(f"{slot} is multiplied the other way round than expected")
        self._unseen.discard(slot)
        input_TI = input.detach().reshape(-1, input.shape[-1])
        product = Product(slot=slot, input=input, input_TI=input_TI, out=out)
        for observer in self._observers:
            observer.observe(product)


def _operands(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Activations and the matrix `[in, out]` they are multiplied with, if `func` does that."""
    if func is nn.functional.linear:
        operands = [*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)]
        return operands[0], operands[1].mT
    if func in _ADDMM:
        operands = [*args, *(kwargs[name] for name in ("mat1", "mat2") if name in kwargs)]
        return operands[1], operands[2]
    if func in _MATMUL and isinstance(args[1], Tensor) and args[1].ndim == 2:
        return args[0], args[1]
    return None


_ADDMM = {torch.addmm, Tensor.addmm}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
