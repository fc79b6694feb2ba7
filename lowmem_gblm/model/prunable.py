"""The prunable weights of decoder blocks, from headers and the meta model alone."""

import re
from collections.abc import Hashable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem_gblm.model.matmul_tap import MatmulWeight
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.storage.checkpoint.reader import Checkpoint

_ROUTER = re.compile(r"^(gate|shared_expert_gate)$|router", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PrunableWeight:
    """A matrix to prune: a 2-D tensor on disk, or one expert's slice of a 3-D one.

    Attributes:
        slot: The matrix that the block multiplies with.
        rows, columns: The part of the slot's stored matrix that this one is.
        in_first_on_disk: Whether it is stored on disk as `[in, out]`.
    """

    name: str
    disk_index: int | None
    slot: MatmulWeight
    rows: slice
    columns: slice
    in_first_on_disk: bool
    out_features: int
    in_features: int

    def __str__(self) -> str:
        return self.name if self.disk_index is None else f"{self.name}[{self.disk_index}]"

    @property
    def numel(self) -> int:
        """Return the number of weights."""
        return self.out_features * self.in_features

    @property
    def inputs(self) -> slice:
        """Return the inputs of the slot that are multiplied with this matrix."""
        return self.rows if self.slot.in_first else self.columns

    @property
    def outputs(self) -> slice:
        """Return the outputs of the slot that are those of this matrix."""
        return self.columns if self.slot.in_first else self.rows

    def on_disk(self, tensor: Tensor) -> Tensor:
        """Return the matrix as an [out, in] view of the tensor read from disk."""
        matrix = tensor if self.disk_index is None else tensor[self.disk_index]
        return matrix.mT if self.in_first_on_disk else matrix

    def in_slot(self, stored: Tensor) -> Tensor:
        """Return the matrix as an [out, in] view of a tensor of the slot's stored shape."""
        part = stored[self.rows, self.columns]
        return part.mT if self.slot.in_first else part


def prunable_weights(checkpoint: Checkpoint, streamed: StreamedModel) -> list[list[PrunableWeight]]:
    """Return the prunable weights of every block, from headers and the meta model alone."""
    known: dict[Hashable, list[PrunableWeight]] = {}
    return [_alike_or_found(checkpoint, streamed, index, known) for index in range(streamed.depth)]


def _alike_or_found(
    checkpoint: Checkpoint,
    streamed: StreamedModel,
    index: int,
    known: dict[Hashable, list[PrunableWeight]],
) -> list[PrunableWeight]:
    """Return the prunable weights of a block; a search takes 0.2 s, so alike blocks share it."""
    names = {_numberless(name, index): name for name in streamed.block_tensors[index]}
    on_disk = frozenset((one, checkpoint.tensors[name].shape) for one, name in names.items())
    parameters = streamed.block(index).named_parameters()
    layout = on_disk, tuple((name, value.shape) for name, value in parameters)
    if layout not in known:
        found = _prunable(checkpoint, streamed, index)
        known[layout] = [replace(one, name=_numberless(one.name, index)) for one in found]
    return [replace(one, name=names[one.name]) for one in known[layout]]


def _numberless(name: str, index: int) -> str:
    return name.replace(f".{index}.", ".*.", 1)


def _prunable(checkpoint: Checkpoint, streamed: StreamedModel, index: int) -> list[PrunableWeight]:
    shapes = {name: checkpoint.tensors[name].shape for name in streamed.block_tensors[index]}
    prefix = streamed.block_prefix(index)
    found = []
    for name, regions in streamed.conversion.regions(shapes).items():
        rows, columns = shapes[name][-2:]
        for region in regions:
            parameter = region.parameter.removeprefix(prefix)
            in_first = _stored_in_first(streamed.block(index), parameter)
            if in_first is None:
                continue
            in_first_on_disk = in_first != region.transposed
            weight = PrunableWeight(
                name=name,
                disk_index=region.disk_index,
                slot=MatmulWeight(parameter=parameter, expert=region.expert, in_first=in_first),
                rows=region.rows,
                columns=region.columns,
                in_first_on_disk=in_first_on_disk,
                out_features=columns if in_first_on_disk else rows,
                in_features=rows if in_first_on_disk else columns,
            )
            found.append(weight)
    return found


def _stored_in_first(block: nn.Module, parameter: str) -> bool | None:
    """Return whether a weight is stored `[in, out]`; None if activations are not multiplied by it.

    Routers stay dense: they decide where tokens go, and are small.
    """
    path, _, leaf = parameter.rpartition(".")
    owner = block.get_submodule(path)
    if leaf not in owner._parameters:
        return None
    shape = block.get_parameter(parameter).shape
    has_experts = any(_holds_experts(*one) for one in block.named_modules())
    if has_experts and any(_ROUTER.search(part) for part in path.split(".")):
        return None
    if len(shape) == 3:
        holds_experts = _holds_experts(path, owner)
        return bool(getattr(owner, "is_transposed", False)) if holds_experts else None
    if leaf != "weight" or len(shape) != 2:
        return None
    if isinstance(owner, nn.Linear):
        return False
    return True if isinstance(owner, Conv1D) else None


def _holds_experts(path: str, module: nn.Module) -> bool:
    return "expert" in f"{path}.{type(module).__name__}".lower()
