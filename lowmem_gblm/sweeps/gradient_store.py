"""The gradient magnitudes of a block between the sweep that measures them and the pruning."""

from collections.abc import Iterator

from torch import Tensor

from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.matmul_tap import MatmulWeight
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.planning.keys import magnitudes
from lowmem_gblm.planning.sizes import Choices
from lowmem_gblm.sweeps.offload import Offload
from lowmem_gblm.sweeps.statistics.packing import pack, packed, unpack


class GradientStore:
    """A store of the gradient magnitudes of every block, by names of tensors on disk.

    With `in_memory`, where a block is pruned before the next one is measured, nothing is moved.
    """

    def __init__(self, offload: Offload, choices: Choices, *, in_memory: bool = False) -> None:
        self._offload = offload
        self._precision = choices.gradient_precision
        self._ahead = choices.read_ahead
        self._in_memory = in_memory
        self._held: dict[str, Tensor] = {}

    def keep(self, block: Block, gradients: dict[MatmulWeight, Tensor]) -> None:
        """Keep float32 magnitudes of a block; the given dictionary is emptied."""
        for weight in block.weights:
            if weight.slot in gradients:
                self._keep(block, weight, weight.in_slot(gradients[weight.slot]))
        gradients.clear()
        # Those of the next block take as much memory.
        self._offload.leave()

    def of_block(self, block: Block) -> Iterator[Tensor | None]:
        """Yield for every matrix its magnitudes, float32 [out, in]; None where it saw no token.

        They are on the device; those of the next matrix are read meanwhile.
        """
        if self._in_memory:
            yield from (self._held.get(str(weight)) for weight in block.weights)
            return
        key = magnitudes(block.index)
        items = [self._items(weight) for weight in block.weights]
        known = [self._offload.holds(key, names[0]) for names in items]
        wanted = [
            [(key, one) for one in names] for names, here in zip(items, known, strict=True) if here
        ]
        arriving = self._offload.fetch(wanted, ahead=self._ahead) if wanted else iter(())
        for weight, here in zip(block.weights, known, strict=True):
            shape = weight.out_features, weight.in_features
            yield unpack(next(arriving), self._precision, shape) if here else None

    def release(self) -> None:
        """Let go of what is held in memory: its block is pruned."""
        self._held.clear()

    def _keep(self, block: Block, weight: PrunableWeight, gradient_OI: Tensor) -> None:
        if self._in_memory:
            self._held[str(weight)] = gradient_OI
            return
        parts = pack(gradient_OI, self._precision)
        for item, part in zip(self._items(weight), parts, strict=True):
            self._offload.write_behind(magnitudes(block.index), item, part)

    def _items(self, weight: PrunableWeight) -> list[str]:
        """Return the names of the tensors that hold the magnitudes of a matrix."""
        shape = weight.out_features, weight.in_features
        return list(packed(str(weight), self._precision, shape))
