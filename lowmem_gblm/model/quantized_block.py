"""A decoder block whose matrices are held in 4 or 8 bits, for a device too small for one block.

Every parameter that activations are multiplied with becomes a *stand-in*: its shape, dtype, device
and the direction of its strides, without its memory. Inside `with PackedWeights`, a product with a
stand-in is done with the matrix, dequantized for that product only, and once more where the
backward pass needs it; the model's own forward runs, and the tap reports the usual products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import call
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.bnb import Quantized, QuantizedKind, quantize
from lowmem_gblm.model.matmul_tap import MatmulWeight, operands


def pack_block(
    block: nn.Module, slots: Sequence[MatmulWeight], kind: QuantizedKind, device: torch.device
) -> PackedWeights:
    """Bring a block to the device, its slots packed; return what to hold around its forward.

    The parameters come on the CPU, in the dtype that is computed in; those of the slots become
    stand-ins. The matrices are copied one at a time: the device never holds the full block. Of a
    fused parameter every expert is packed, whichever of them are named.
    """
    in_first = {slot.parameter: slot.in_first for slot in slots}
    stand_ins = {name: _stand_in(block.get_parameter(name).data, device) for name in in_first}
    matrices: dict[MatmulWeight, Tensor] = {}
    for name, stand_in in stand_ins.items():
        experts = [None] if stand_in.ndim == 2 else range(len(stand_in))
        for expert in experts:
            slot = MatmulWeight(parameter=name, expert=expert, in_first=in_first[name])
            matrices[slot] = stand_in if expert is None else stand_in[expert]
    packed = PackedWeights(kind, matrices)
    for slot in packed.slots:
        packed.set(slot, slot.stored(block))
    for name, stand_in in stand_ins.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(stand_in, requires_grad=False))
    block.to(device)
    return packed


class PackedWeights(TorchFunctionMode):
    """The packed matrices of one block; a context in which they replace the stand-ins.

    To be entered before a `Tap`, which finds the stand-ins in the place of the parameters. For the
    backward pass a reference is saved instead of the dequantized matrix; the backward pass may run
    outside of the `with`. The weights get no gradients.
    """

    def __init__(self, kind: QuantizedKind, stand_ins: Mapping[MatmulWeight, Tensor]) -> None:
        super().__init__()
        self._kind = kind
        self._stand_ins = dict(stand_ins)
        self._matrices: dict[MatmulWeight, Quantized] = {}
        self._addresses = {tensor.data_ptr(): slot for slot, tensor in stand_ins.items()}
        self._storages = {_storage(tensor): slot for slot, tensor in stand_ins.items()}

    def __enter__(self) -> Self:
        self._hooks = saved_tensors_hooks(self._restoring, call)
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(*error)
        # They refer to this object, whose matrices would stay until a collection of garbage.
        del self._hooks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pair = operands(func, args, kwargs)
        slot = None if pair is None else self._addresses.get(pair[1].data_ptr())
        if slot is not None:
            return self._multiply(slot, func, args, kwargs)
        out = func(*args, **kwargs)
        self._refuse_numbers_of_stand_ins(func, [*args, *kwargs.values()], out)
        return out

    @property
    def slots(self) -> list[MatmulWeight]:
        """Return the slots whose matrices are packed."""
        return list(self._stand_ins)

    def set(self, slot: MatmulWeight, matrix: Tensor) -> None:
        """Pack a matrix, any device, 2-D, as stored, for a slot; it is not modified."""
        stand_in = self._stand_ins[slot]
        assert matrix.shape == stand_in.shape, f"{slot} has another shape"
        self._matrices.pop(slot, None)
        self._matrices[slot] = quantize(matrix.to(stand_in.device, stand_in.dtype), self._kind)

    def stored(self, slot: MatmulWeight) -> Tensor:
        """Return the slot's dequantized matrix, 2-D, as stored, on the device."""
        return self._matrices[slot].dequantized()

    def _multiply(
        self, slot: MatmulWeight, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the same operation with the matrix in the place of its stand-in."""
        matrix = self.stored(slot)

        def real(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.data_ptr() not in self._addresses:
                return value
            if not _is_whole(value, matrix.shape):
                raise UnsupportedModel(f"{slot} is multiplied in parts")
            return matrix.mT if _is_turned(value, matrix.shape) else matrix

        given = [real(value) for value in args]
        named = {name: real(value) for name, value in kwargs.items()}
        self._addresses[matrix.data_ptr()] = slot
        try:
            return func(*given, **named)
        finally:
            del self._addresses[matrix.data_ptr()]

    def _restoring(self, saved: Tensor) -> Callable[[], Tensor]:
        """Return what gives the backward pass a tensor that autograd saves for it."""
        slot = self._addresses.get(saved.data_ptr())
        if slot is None or not _is_whole(saved, self._stand_ins[slot].shape):
            return partial(_unchanged, saved, saved._version)
        return partial(self._turned, slot, _is_turned(saved, self._stand_ins[slot].shape))

    def _turned(self, slot: MatmulWeight, is_turned: bool) -> Tensor:
        matrix = self.stored(slot)
        return matrix.mT if is_turned else matrix

    def _refuse_numbers_of_stand_ins(self, func: Any, given: list[Any], out: Any) -> None:
        """Raise if numbers were computed from a stand-in; only views of it are allowed."""
        used = [slot for tensor in _tensors(given) if (slot := self._slot_of(tensor)) is not None]
        if used and any(self._slot_of(tensor) is None for tensor in _tensors([out])):
            name = getattr(func, "__name__", func)
            raise UnsupportedModel(
                f"the block uses {used[0].parameter} in {name}, which cannot be followed with "
                f"packed weights: compute with full weights instead"
            )

    def _slot_of(self, tensor: Tensor) -> MatmulWeight | None:
        return self._storages.get(_storage(tensor))


def _unchanged(saved: Tensor, version: int) -> Tensor:
    """Return a saved tensor; hooks on them switch off autograd's own check of the version."""
    if saved._version != version:
        raise UnsupportedModel("the block changes a tensor that its backward pass needs")
    return saved


def _stand_in(parameter: Tensor, device: torch.device) -> Tensor:
    """Return a tensor like a parameter, on the device, of little more than one row of memory.

    All rows share one row of memory, and every expert begins one number later, so that it has its
    own address. Strides run along the rows, so a transposed view can be told apart. The numbers are
    NaN: a product computed with them by mistake shows.
    """
    experts = len(parameter) if parameter.ndim == 3 else 1
    numbers = parameter.new_full(
        (experts + parameter.shape[-1] - 1,), torch.nan, device=device, requires_grad=False
    )
    return numbers.as_strided(parameter.shape, (1, 0, 1)[-parameter.ndim :])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_whole(view: Tensor, shape: torch.Size) -> bool:
    """Return whether a view has all of a matrix of that shape, either way round."""
    return view.shape in (shape, shape[::-1])


def _is_turned(view: Tensor, shape: torch.Size) -> bool:
    """Return whether a view of all of a matrix of that shape is its transpose."""
    return view.shape != shape or view.stride(-1) != 1


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
