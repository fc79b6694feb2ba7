"""Whether numbers are finite, without memory of their own and without waiting for a GPU."""

from collections.abc import Iterable

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
