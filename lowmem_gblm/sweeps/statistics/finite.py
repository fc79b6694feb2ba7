"""Whether numbers are finite, without memory of their own and without waiting for a GPU."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> Tensor:
    """Return whether every number is finite: bool, 0-dim, on the device of `tensor`.

    Unlike `isfinite().all()` this takes no memory; a NaN is its own minimum and maximum.
    """
    least, largest = tensor.detach().aminmax()
    return least.isfinite() & largest.isfinite()


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every number of every tensor is finite; this waits once for their device."""
    found = [all_finite(tensor) for tensor in tensors]
    return not found or bool(torch.stack(found).all())


class FiniteSamples:
    """Which samples have left a block with finite numbers; the device is waited for once.

    The flags are one tensor: small tensors that are alive until a block is done would lie between
    hidden states that come and go, and what these leave could not be used again.

    Args:
        order: The numbers of the samples, as they come.
    """

    def __init__(self, order: Sequence[int], device: torch.device) -> None:
        self._order = order
        self._flags = torch.ones(len(order), dtype=torch.bool, device=device)

    def look_at(self, at: int, tensor: Tensor) -> None:
        """Note whether the numbers that the sample at a place of the order has left are finite."""
        self._flags[at] = all_finite(tensor)

    def others(self) -> list[int]:
        """Return the samples that are not finite."""
        flags = self._flags.tolist()
        return [n for n, sound in zip(self._order, flags, strict=True) if not sound]
