"""Whether a model computes sequences with a shared prefix as it computes them apart.

Models may see more than the mask says, or count positions by themselves: recurrences, biases by
distance, windows. So every block is asked, with its own weights, before it computes anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.meta_model import FOREIGN_ERRORS, reason
from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.planning.keys import boundary
from lowmem_gblm.runtime.accelerator import is_device_error
from lowmem_gblm.sweeps.context import SweepContext

# Tolerated errors relative to a token's hidden states, in units of what the dtype resolves: of half
# of the tokens, and of any. For float32, in which kernels differ by more, there is a smallest one.
_OF_HALF, _OF_ANY, _SMALLEST = 1 / 3, 2, 1e-5
_DIFFERS = "does not compute sequences with a shared prefix as it computes them apart"


class PrefixNotShared(Exception):
    """The model does not compute sequences with a shared prefix as it computes them apart."""


def check_embeddings(run: SweepContext) -> None:
    """Raise `PrefixNotShared` unless the same hidden states enter block 0.

    How the blocks are called is recorded for `check_block`.
    """
    for n, layout in _checked(run):
        tokens_BT = run.tokens[n]
        with foreign_errors_mean_no():
            together = run.model.embed(tokens_BT, layout)
            apart = run.model.embed(_last(tokens_BT, layout))
        if _differ(_last(together, layout), apart, layout):
            raise PrefixNotShared(f"the embedding {_DIFFERS}")


@torch.no_grad()
def check_block(run: SweepContext, block: Block) -> None:
    """Raise `PrefixNotShared` unless the resident block returns the same, but for rounding."""
    for n, layout in _checked(run):
        ((hidden,),) = run.offload.fetch([[(boundary("dense", block.index), n)]])
        with foreign_errors_mean_no():
            together = run.model.forward_block(block.index, hidden, layout=layout)
            apart = run.model.forward_block(block.index, _last(hidden, layout))
        if _differ(_last(together, layout), apart, layout, routed=run.routed):
            raise PrefixNotShared(f"decoder block {block.index} {_DIFFERS}")


@contextmanager
def foreign_errors_mean_no() -> Iterator[None]:
    """Run the body; code of the model that fails does not share prefixes."""
    try:
        yield
    except (*FOREIGN_ERRORS, UnsupportedModel) as error:
        if is_device_error(error):
            raise
        raise PrefixNotShared(reason(error)) from error


def _checked(run: SweepContext) -> list[tuple[int, SharedPrefix]]:
    """Return the sample whose sequences are the longest, and its layout; none if none share."""
    layouts = run.layouts.items()
    return [max(layouts, key=lambda one: one[1].prefix + one[1].ending)] if layouts else []


def _last(lines: Tensor, layout: SharedPrefix) -> Tensor:
    """Return the last sequence of the last line of [B, T, …], as a batch.

    It would be wrong if it saw another ending, or had other positions.
    """
    return layout.sequence(lines[-1], layout.endings - 1)[None]


def _differ(found: Tensor, expected: Tensor, layout: SharedPrefix, *, routed: bool = False) -> bool:
    """Return whether hidden states [1, T, hidden] of the ending of a sequence differ.

    Rounding sends single tokens to other experts: where tokens are `routed`, half of them may
    differ. Where the expected states are not finite, nothing is said.
    """
    resolution = torch.finfo(found.dtype).eps
    found, expected = (one[0, layout.prefix :].float() for one in (found, expected))
    error_T = (found - expected).norm(dim=1) / expected.norm(dim=1)
    alike = error_T.median() <= max(_OF_HALF * resolution, _SMALLEST)
    if not routed:
        alike &= error_T.max() <= max(_OF_ANY * resolution, _SMALLEST)
    return bool(expected.isfinite().all() & ~alike)
