"""The gradient magnitudes of a block between the reverse sweep and its pruning."""

from __future__ import annotations

from torch import Tensor

from lowmem_gblm.disk.spill import Spill
from lowmem_gblm.model.stream import Block
from lowmem_gblm.model.tap import Slot
from lowmem_gblm.planning import StoreKind
from lowmem_gblm.stats.store import PARTS, pack, unpack
from lowmem_gblm.sweeps.conveyor import Conveyor


class Magnitudes:
    """Keeps the gradient magnitudes of every block until it is pruned.

    Args:
        spill: Where they wait.
        conveyor: What brings them there.
        kind: In which precision.
    """

    def __init__(self, spill: Spill, conveyor: Conveyor, kind: StoreKind) -> None:
        self._spill = spill
        self._conveyor = conveyor
        self._kind = kind

    def keep(self, block: Block, gradients: dict[Slot, Tensor]) -> None:
        """Take those of a block, or of some of its slots; float32, given away."""
        items = {slot: item for item, slot in enumerate(block.slots)}
        for slot in list(gradients):
            for number, part in enumerate(pack(gradients.pop(slot), self._kind)):
                self._conveyor.leaving(_name(block, number), items[slot], part)

    def of(self, block: Block, slot: Slot) -> Tensor | None:
        """Those of one slot, float32 [as stored]; None for an expert that saw no token."""
        self._conveyor.settle()
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
