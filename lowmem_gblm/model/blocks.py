"""One decoder block at a time: reading the next one ahead, and what in a block can be pruned."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem_gblm.disk.checkpoint import Checkpoint
from lowmem_gblm.errors import NonFiniteError, RequestError
from lowmem_gblm.memory import give_back_freed
from lowmem_gblm.model.names import Region
from lowmem_gblm.model.skeleton import Skeleton
from lowmem_gblm.model.tap import Slot

_BUFFERS = 2
_ALIGNMENT_BYTES = 64
_ROUTER = re.compile(r"^(gate|shared_expert_gate)$|router", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PrunableWeight:
    """One matrix to prune: a 2-D tensor on disk, or one expert's slice of a 3-D one.

    Attributes:
        name: Name of the tensor on disk.
        disk_index: Leading index on disk, or None.
        slot: Where the block multiplies with it.
        rows, columns: Which part of the slot's stored matrix it is.
        in_first_on_disk: Whether it lies on disk as `[in, out]`.
        out_features, in_features: Its size.
    """

    name: str
    disk_index: int | None
    slot: Slot
    rows: slice
    columns: slice
    in_first_on_disk: bool
    out_features: int
    in_features: int

    def __str__(self) -> str:
        return self.name if self.disk_index is None else f"{self.name}[{self.disk_index}]"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def inputs(self) -> slice:
        """Which of the slot's inputs are this matrix's."""
        return self.rows if self.slot.in_first else self.columns

    def on_disk(self, tensor: Tensor) -> Tensor:
        """The matrix as an [out, in] view of the tensor read from disk."""
        matrix = tensor if self.disk_index is None else tensor[self.disk_index]
        return matrix.mT if self.in_first_on_disk else matrix

    def in_slot(self, stored: Tensor) -> Tensor:
        """The matrix as an [out, in] view of something that has the slot's stored shape."""
        part = stored[self.rows, self.columns]
        return part.mT if self.slot.in_first else part


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder block whose parameters are resident.

    Attributes:
        index: Its position, from 0.
        module: The module.
        raw: Its tensors as they lie on disk, by name; on a CPU the module may share their memory.
        weights: What can be pruned in it.
    """

    index: int
    module: nn.Module
    raw: dict[str, Tensor]
    weights: list[PrunableWeight]

    @property
    def slots(self) -> list[Slot]:
        """The matrices that the block multiplies with, each once."""
        return list(dict.fromkeys(weight.slot for weight in self.weights))


class BlockStream:
    """Reads decoder blocks in a given order, one ahead of the one that is resident.

    Args:
        checkpoint: Where the tensors are.
        skeleton: The model they are loaded into.
        weights: What can be pruned in every block; None where nobody asks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: Skeleton,
        weights: Sequence[list[PrunableWeight]] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._weights = weights or [[] for _ in range(skeleton.depth)]
        self._buffers = _Buffers(
            max(self._room(names) for names in skeleton.block_tensors),
            pinned=skeleton.device.type == "cuda",
        )

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return self._skeleton.depth

    def stream(self, order: Sequence[int], *, keep_raw: bool) -> Iterator[Block]:
        """Make the blocks resident one after the other; a block is freed when the next is asked.

        Blocks are read into two buffers that are used over and over: at any time there are at
        most two blocks in host memory, the resident one and the next.

        Args:
            order: Which blocks, in which order.
            keep_raw: Whether `Block.raw` is wanted; without it, `raw` is empty.
        """
        following = iter(order)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
            pending = deque(reader.submit(self._read, index) for index in islice(following, 1))
            for index in order:
                raw, buffer = pending.popleft().result()
                pending.extend(reader.submit(self._read, next_) for next_ in islice(following, 1))
                self._skeleton.load_block(index, raw)
                if not keep_raw:
                    raw.clear()
                try:
                    yield Block(
                        index=index,
                        module=self._skeleton.block(index),
                        raw=raw,
                        weights=self._weights[index],
                    )
                finally:
                    self._skeleton.free_block(index)
                    # The consumer may still hold the Block: its tensors go all the same.
                    raw.clear()
                    self._buffers.give_back(buffer)
                    give_back_freed()

    def _read(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of a block, and the buffer that they lie in."""
        buffer = self._buffers.take()
        raw: dict[str, Tensor] = {}
        position = 0
        for name in self._skeleton.block_tensors[index]:
            size = self._checkpoint.tensors[name].nbytes
            part = buffer[position : position + size]
            raw[name] = _finite(name, self._checkpoint.read(name, part))
            position += _aligned(size)
        return raw, buffer

    def _room(self, names: Sequence[str]) -> int:
        return sum(_aligned(self._checkpoint.tensors[name].nbytes) for name in names)


class _Buffers:
    """Two pieces of host memory that take turns: one for the resident block, one for the next."""

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self._size_bytes = size_bytes
        self._pinned = pinned
        self._free: deque[Tensor] = deque()
        self.taken = 0

    def take(self) -> Tensor:
        self.taken += 1
        assert self.taken <= _BUFFERS, "a block is read while two are in memory"
        if self._free:
            return self._free.popleft()
        return torch.empty(self._size_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        self.taken -= 1
        self._free.append(buffer)


def _aligned(size_bytes: int) -> int:
    """Up to the next multiple of a cache line, where the next tensor may begin."""
    return size_bytes + -size_bytes % _ALIGNMENT_BYTES


def prunable_weights(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[list[PrunableWeight]]:
    """What can be pruned in every block, from headers and the hollow model alone.

    Args:
        include: Globs over names on disk; without any, everything prunable is pruned.
        exclude: Globs over names on disk that stay dense.

    Raises:
        RequestError: The globs leave nothing to prune.
    """
    blocks = [
        [
            weight
            for weight in _prunable(checkpoint, skeleton, index)
            if _selected(weight.name, include, exclude)
        ]
        for index in range(skeleton.depth)
    ]
    if not any(blocks):
        raise RequestError("--include and --exclude leave nothing to prune")
    return blocks


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself. Raises `NonFiniteError` if a NaN or an infinity is in it."""
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel():
        # Unlike `isfinite().all()` this takes no memory; a NaN is its own minimum and maximum.
        extremes = torch.stack(tensor.aminmax())
        if not bool(extremes.isfinite().all()):
            raise NonFiniteError(f"{name} holds NaN or infinite weights: {extremes.tolist()}")
    return tensor


def _prunable(checkpoint: Checkpoint, skeleton: Skeleton, index: int) -> list[PrunableWeight]:
    shapes = {name: checkpoint.tensors[name].shape for name in skeleton.block_tensors[index]}
    prefix = skeleton.block_prefix(index)
    module = skeleton.block(index)
    return [
        _prunable_weight(name, shapes[name], region, prefix, in_first)
        for name, regions in skeleton.names.regions(shapes).items()
        for region in regions
        if (in_first := _stored_in_first(module, region.parameter.removeprefix(prefix))) is not None
    ]


def _prunable_weight(
    name: str, shape: tuple[int, ...], region: Region, prefix: str, in_first: bool
) -> PrunableWeight:
    slot = Slot(
        parameter=region.parameter.removeprefix(prefix), expert=region.expert, in_first=in_first
    )
    in_first_on_disk = in_first != region.transposed
    in_features, out_features = shape[-2:] if in_first_on_disk else shape[:-3:-1]
    return PrunableWeight(
        name=name,
        disk_index=region.disk_index,
        slot=slot,
        rows=region.rows,
        columns=region.columns,
        in_first_on_disk=in_first_on_disk,
        out_features=out_features,
        in_features=in_features,
    )


def _stored_in_first(block: nn.Module, parameter: str) -> bool | None:
    """How a weight that multiplies activations is stored: True for `[in, out]`; None if it is not.

    Routers stay dense: they decide where tokens go, and are small.
    """
    path, _, leaf = parameter.rpartition(".")
    owner = block.get_submodule(path)
    if leaf not in owner._parameters:
        return None
    shape = block.get_parameter(parameter).shape
    if _has_experts(block) and any(_ROUTER.search(part) for part in path.split(".")):
        return None
    if len(shape) == 3:
        holds_experts = "expert" in f"{path}.{type(owner).__name__}".lower()
        return bool(getattr(owner, "is_transposed", False)) if holds_experts else None
    if leaf != "weight" or len(shape) != 2:
        return None
    if isinstance(owner, nn.Linear):
        return False
    return True if isinstance(owner, Conv1D) else None


def _has_experts(block: nn.Module) -> bool:
    return any(
        "expert" in f"{name}.{type(module).__name__}".lower()
        for name, module in block.named_modules()
    )


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatchcase(name, glob) for glob in include):
        return False
    return not any(fnmatchcase(name, glob) for glob in exclude)
