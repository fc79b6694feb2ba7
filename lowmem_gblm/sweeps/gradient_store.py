"""The gradient magnitudes of a block between the reverse sweep and its pruning."""

from __future__ import annotations

from torch import Tensor

from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.matmul_tap import MatmulWeight
from lowmem_gblm.planning import GradientPrecision
from lowmem_gblm.storage.tensor_store import TensorStore
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.statistics.packing import PARTS, pack, unpack


class GradientStore:
    """Keeps the gradient magnitudes of every block until it is pruned.

    Args:
        spill: Where they wait.
        offload: What brings them there.
        kind: In which precision.
    """

    def __init__(self, spill: TensorStore, offload: Offload, kind: GradientPrecision) -> None:
        self._spill = spill
        self._offload = offload
        self._kind = kind

    def keep(self, block: Block, gradients: dict[MatmulWeight, Tensor]) -> None:
        """Take those of a block, or of some of its slots; float32, given away."""
        items = {slot: item for item, slot in enumerate(block.slots)}
        for slot in list(gradients):
            for number, part in enumerate(pack(gradients.pop(slot), self._kind)):
                self._offload.write_behind(_name(block, number), items[slot], part)

    def of(self, block: Block, slot: MatmulWeight) -> Tensor | None:
        """Those of one slot, float32 [as stored]; None for an expert that saw no token."""
        self._offload.settle()
        item = block.slots.index(slot)
        if not self._spill.holds(_name(block, 0), item):
            return None
        parts = tuple(self._spill.read(name, item) for name in self.names(block))
        return unpack(parts, self._kind, tuple(slot.stored(block.module).shape))

    def names(self, block: Block) -> list[str]:
        """Under which names those of a block are in the spill."""
        return [_name(block, number) for number in range(PARTS[self._kind])]


def _name(block: Block, part: int) -> str:
    return f"magnitudes-{block.index}-{part}"
