"""The stubs that replace the decoder blocks while the model's own forward runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_gblm.errors import UnsupportedModel


@dataclass(frozen=True)
class Call:
    """The arguments of one block besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# Takes the number of a block, its hidden states and its call; returns what its stub returns.
Visit = Callable[[int, Tensor, Call], Any]


@contextmanager
def stubs_in(layers: nn.ModuleList, visit: Visit) -> Iterator[None]:
    """Run the body with a stub in the place of every block of the list."""
    blocks = list(layers)
    for index, block in enumerate(blocks):
        layers[index] = _Stub(block, index, visit)
    try:
        yield
    finally:
        for index, block in enumerate(blocks):
            layers[index] = block


class _Stub(nn.Module):
    """A stub of one block: attributes are those of the block, calls go to `visit`."""

    def __init__(self, block: nn.Module, index: int, visit: Visit) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._index = index
        self._visit = visit

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._visit(self._index, hidden, Call(args, kwargs))


class Recorder:
    """A visitor that keeps what enters block 0 and how each block is called."""

    def __init__(self, depth: int) -> None:
        self.calls: list[Call] = []
        self._depth = depth

    def visit(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Return the complete hidden states that entered block 0."""
        if index == 0:
            self.entering = hidden
        elif hidden.data_ptr() != self.entering.data_ptr():
            raise UnsupportedModel(
                f"the hidden states are changed between decoder blocks {index - 1} and {index}"
            )
        self.calls.append(call)
        return self.entering

    def returns_tuple(self, last_hidden: Tensor) -> bool:
        """Return whether blocks must return tuples: the model has taken row 0 of a tensor.

        That does not show, and does no harm, where there is one row and the model restores its
        shape.
        """
        if len(self.calls) != self._depth:
            raise UnsupportedModel(
                f"a forward pass calls {len(self.calls)} of {self._depth} decoder blocks: such a "
                f"model cannot be streamed block by block"
            )
        return last_hidden.shape[:-1] != self.entering.shape[:-1]


def replaying(last_hidden: Tensor, depth: int, as_tuple: bool) -> Visit:
    """Return what has the last block return given hidden states, which the final norm then sees."""

    def visit(index: int, hidden: Tensor, call: Call) -> Any:
        out = last_hidden if index == depth - 1 else hidden
        return (out,) if as_tuple else out

    return visit


def check_same(first: list[Call], second: list[Call]) -> None:
    """Raise `UnsupportedModel` unless every block is called alike in two forward passes."""
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if not _equal((one.args, one.kwargs), (other.args, other.kwargs)):
            raise UnsupportedModel(
                f"decoder block {index} is called with arguments that depend on the sample"
            )


def _equal(one: Any, other: Any) -> bool:
    """Compare through tuples, lists and dicts, with tensors compared by value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and (
        one == other if isinstance(one, (int, float, str, bool, type(None))) else True
    )
