"""Names in the work folder: what is stored between the steps of a run."""

from dataclasses import dataclass
from typing import Literal, Self, cast

Stream = Literal["dense", "pruned"]
Kind = Literal["embedded", "dense", "pruned", "trial", "loss-gradient", "magnitudes"]


@dataclass(frozen=True, order=True)
class Key:
    """A name in the work folder: one tensor of it for every sample, or for every matrix.

    Attributes:
        kind: "dense" and "pruned" are boundaries of that stream, and "embedded" is boundary 0 of
            both, with that of held-out windows; "trial" are boundaries of held-out windows in the
            models of all candidates; "loss-gradient" is the gradient of the loss at a boundary;
            "magnitudes" are the gradient magnitudes of a block.
        index: Number of the boundary or of the block.
    """

    kind: Kind
    index: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.index}"

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the key that `str` has made this name of."""
        kind, _, index = name.rpartition("-")
        return cls(cast(Kind, kind), int(index))

    @property
    def is_per_sample(self) -> bool:
        """Return whether there is a tensor for every sample; else for every matrix of a block."""
        return self.kind != "magnitudes"

    @property
    def holds(self) -> str:
        """Return what the file of this name holds, for a sentence."""
        if self.kind == "magnitudes":
            return f"the gradient magnitudes of block {self.index}"
        what = "gradients" if self.kind == "loss-gradient" else "hidden states"
        return f"the {what} before block {self.index}"


def boundary(stream: Stream, index: int) -> Key:
    """Return the key of the hidden states that enter a block; both streams share the first."""
    return Key(stream if index else "embedded", index)


def trial(index: int) -> Key:
    """Return the key of held-out windows that enter a block of the models of all candidates."""
    return Key("trial" if index else "embedded", index)


def loss_gradient(index: int) -> Key:
    """Return the key of the gradient of the loss at boundary `index`."""
    return Key("loss-gradient", index)


def magnitudes(block: int) -> Key:
    """Return the key of the gradient magnitudes of a block."""
    return Key("magnitudes", block)
