"""Whether a model computes sequences with a shared prefix as it computes them apart.

Models may see more than the mask says, or count positions by themselves: recurrences, biases by
distance, windows. So every block is asked, with its own weights, before it computes anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.block_loader import Block
from lowmem_gblm.model.meta_model import FOREIGN_ERRORS, reason
from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.planning.keys import boundary
from lowmem_gblm.runtime.accelerator import is_device_error
from lowmem_gblm.sweeps.context import SweepContext

# Of float32, whose rounding is smaller than what kernels differ by.
_SMALLEST_TOLERANCE = 1e-5
_DIFFER = "does not compute answers that share it as it computes them apart"


class PrefixNotShared(Exception):
    """The model does not compute sequences with a shared prefix as it computes them apart."""


def check_embeddings(run: SweepContext) -> None:
    """Raise `PrefixNotShared` unless the same hidden states enter block 0.

    How the blocks are called is recorded for `check_block`.
    """
    for n, layout in _first(run):
        line_1T = run.tokens[n][:1]
        with _foreign_errors_mean_no():
            together = run.model.embed(line_1T, layout)
            apart = run.model.embed(layout.apart(line_1T[0]))
        if not torch.equal(layout.apart(together[0]), apart):
            raise PrefixNotShared(f"the embedding {_DIFFER}")


@torch.no_grad()
def check_block(run: SweepContext, block: Block) -> None:
    """Raise `PrefixNotShared` unless the resident block returns the same, but for rounding.

    Compared is the last ending, which would be wrong if it saw another, or had other positions.
    The median over its tokens does not see single tokens that rounding sends to other experts.
    """
    for n, layout in _first(run):
        ((hidden_BTH,),) = run.offload.fetch([[(boundary("dense", block.index), n)]])
        with _foreign_errors_mean_no():
            together = run.model.forward_block(block.index, hidden_BTH[:1], layout=layout)
            apart = run.model.forward_block(block.index, layout.apart(hidden_BTH[0]))
        found, expected = (
            sequences[-1, layout.prefix :].float()
            for sequences in (layout.apart(together[0]), apart)
        )
        error_T = (found - expected).norm(dim=1) / expected.norm(dim=1)
        # One that is not finite is the samples' own.
        if bool(error_T.median() > _tolerance(hidden_BTH)):
            raise PrefixNotShared(f"decoder block {block.index} {_DIFFER}")


def _first(run: SweepContext) -> Iterator[tuple[int, SharedPrefix]]:
    """Yield the first sample whose lines share prefixes, which has the longest lines."""
    yield from islice(run.layouts.items(), 1)


def _tolerance(hidden: Tensor) -> float:
    """Return 3.5 times the error of rounding to half precision."""
    return max(torch.finfo(hidden.dtype).eps / 2, _SMALLEST_TOLERANCE)


@contextmanager
def _foreign_errors_mean_no() -> Iterator[None]:
    """Run the body; code of the model that fails does not share prefixes."""
    try:
        yield
    except (*FOREIGN_ERRORS, UnsupportedModel) as error:
        if is_device_error(error):
            raise
        raise PrefixNotShared(reason(error)) from error
