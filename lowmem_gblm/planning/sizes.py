"""What a plan follows from: the sizes of the model, the work to be done, and the choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem_gblm.planning.schedule import Schedule

FLOAT32_BYTES = 4
GradientPrecision = Literal["float32", "bfloat16", "int8"]
# From the most exact to the smallest. The last two round gradient magnitudes between the sweeps.
STORES: tuple[GradientPrecision, ...] = ("float32", "bfloat16", "int8")
_STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that memory and work follow from.

    Attributes:
        block_bytes: Bytes on disk of every decoder block.
        rest_bytes: Bytes on disk of all other tensors the model uses.
        rest_weights: The number of weights of these tensors.
        total_bytes: Bytes on disk of all tensors.
        side_bytes: Bytes of an output beside its tensors: side files, headers, the record.
        prunable: Prunable weights of every block.
        slots: Weights of every matrix that the largest block multiplies with.
        squared_inputs: Sum of in² over the inputs of the largest block; matrices that are
            multiplied with one tensor share one.
        columns: Inputs of all matrices of the largest block.
        active_fraction: Share of the weights that one token uses (below 1 with routed experts).
        largest_matrix: Weights of the largest prunable matrix.
        widest_input: Inputs of the widest prunable matrix.
        feature_widths: Sum of the outputs of a block's prunable matrices that one token uses.
        hidden_size: Width of a boundary.
        attention_matrices: Whether attention holds its [heads, T, T] probabilities (eager) or not.
        vocab_size: Width of the logits.
    """

    block_bytes: tuple[int, ...]
    rest_bytes: int
    rest_weights: int
    total_bytes: int
    side_bytes: int
    prunable: tuple[int, ...]
    slots: tuple[int, ...]
    squared_inputs: int
    columns: int
    active_fraction: float
    largest_matrix: int
    widest_input: int
    feature_widths: int
    hidden_size: int
    heads: int
    attention_matrices: bool
    vocab_size: int

    @property
    def depth(self) -> int:
        """Return the number of decoder blocks."""
        return len(self.block_bytes)


@dataclass(frozen=True, kw_only=True)
class ActivationCost:
    """The cost of the statistics of activations of the largest block.

    Attributes:
        entries: float32 numbers that are held for the block.
        largest_entries: float32 numbers of the largest result, which is made beside them.
        flops_per_token: FLOPs for every token.
    """

    entries: int = 0
    largest_entries: int = 0
    flops_per_token: int = 0


@dataclass(frozen=True, kw_only=True)
class DecisionCost:
    """The cost of a decision about one matrix; see `lowmem_gblm.methods.Method`."""

    bytes_per_weight: float = 0
    bytes_per_squared_input: float = 0
    flops_per_cubed_input: float = 0
    sweeps_columns: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work to be done with the model.

    Attributes:
        nsamples, seqlen: The numbers N and T.
        itemsize: Bytes of one number of the computation.
        shares_memory: Whether a resident block shares the memory of what was read.
        resident_bits: Bits of a prunable weight while its block is resident: 4 or 8 with
            `--compute-weights`, else None.
        logits_chunk: Logits computed at once.
        tile: Numbers of a sample's gradient that are worked on at once.
        slab: Numbers of a matrix that are decided at once.
        stores: The precisions in which gradient magnitudes may be stored.
        writes: Whether a checkpoint is written.
        rewrites: Whether pruned blocks are written over the dense blocks, by way of the work
            folder.
    """

    schedule: Schedule
    activations: ActivationCost
    deciding: DecisionCost
    nsamples: int
    seqlen: int
    itemsize: int
    on_gpu: bool
    shares_memory: bool
    resident_bits: int | None
    logits_chunk: int
    tile: int
    slab: int
    stores: tuple[GradientPrecision, ...] = STORES
    writes: bool = True
    rewrites: bool = False


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The way in which the work is done; only `gradient_precision` changes numbers.

    Attributes:
        read_ahead: Whether host memory holds two blocks: the resident one and the next.
        copy_ahead: Whether the GPU holds two blocks, too.
        behind_bytes: Bytes that may be on their way to the work folder beside the computation.
        boundary_interval: Boundaries 0, k, 2k, … are kept; all others are computed again.
        accumulator_bytes: Most that the gradient accumulators of a block take at once; None for
            all of a block. Every part after the first takes another forward and backward pass.
        gradient_precision: Precision of the gradient magnitudes stored between two sweeps.
    """

    read_ahead: bool = True
    copy_ahead: bool = False
    behind_bytes: int = 0
    boundary_interval: int = 1
    accumulator_bytes: int | None = None
    gradient_precision: GradientPrecision = "float32"


def stores(work: Workload, choices: Choices) -> bool:
    """Return whether gradient magnitudes are stored in the work folder, all or those of a part."""
    sliced = work.schedule.keeps_boundaries and choices.accumulator_bytes is not None
    return work.schedule.stores_gradients or sliced


def stored_bytes(weights: int, precision: GradientPrecision) -> int:
    """Return the bytes of the stored gradient magnitudes of a number of weights."""
    return int(weights * _STORED_BYTES[precision])


def slices_within(sizes: Sequence[int], limit: int | None) -> list[list[int]]:
    """Return parts, each a list of positions of `sizes` that add up to at most `limit`, in order.

    A size larger than the limit is a part of its own. With None there is a single part.
    """
    if limit is None:
        return [list(range(len(sizes)))]
    parts: list[list[int]] = []
    room = 0
    for item, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(item)
        room -= size
    return parts
