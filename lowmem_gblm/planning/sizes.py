"""What a plan follows from: the sizes of the model, the work to be done, and the choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem_gblm.planning.schedule import Schedule

FLOAT32_BYTES = 4
GradientPrecision = Literal["float32", "bfloat16", "int8"]
# Bytes of a stored number, from the most exact precision to the smallest. The last two round
# gradient magnitudes between the sweeps.
STORES: dict[GradientPrecision, float] = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that memory and work follow from.

    Attributes:
        block_bytes: Bytes on disk of every decoder block.
        rest_bytes: Bytes on disk of all other tensors the model uses.
        rest_weights: The number of weights of these tensors.
        total_bytes: Bytes on disk of all tensors.
        side_bytes: Bytes of an output beside its tensors: side files, headers, the record.
        prunable: The number of prunable weights of every block.
        slots: Weights of every matrix that the largest block multiplies with.
        squared_inputs: Sum of in² over the inputs of the largest block; matrices that are
            multiplied with one tensor share one.
        columns: Inputs of all matrices of the largest block.
        active_fraction: Share of the weights that one token uses (below 1 with routed experts).
        largest_matrix, widest_input: Weights of the largest prunable matrix, inputs of the widest.
        feature_widths: Sum of the outputs of a block's prunable matrices that one token uses.
        attention_matrices: Whether attention holds its [heads, T, T] probabilities (eager) or not.
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

    @property
    def outside_bytes(self) -> int:
        """Return the bytes on disk of what no block holds."""
        return self.total_bytes - sum(self.block_bytes)

    @property
    def accumulators(self) -> list[int]:
        """Return the bytes of the float32 sums of gradients for every one of `slots`."""
        return [weights * FLOAT32_BYTES for weights in self.slots]


def compiles_every_shape(on_gpu: bool, itemsize: int) -> bool:
    """Return whether a product is compiled for every number of tokens: some 10 ms and 1 MiB each.

    oneDNN does so in half precision, on a CPU.
    """
    return itemsize < FLOAT32_BYTES and not on_gpu


@dataclass(frozen=True, kw_only=True)
class ActivationCost:
    """The cost of the statistics of activations of the largest block.

    `entries` float32 numbers are held; the largest result, `largest_entries`, is made beside them.
    """

    entries: int = 0
    largest_entries: int = 0
    flops_per_token: int = 0


@dataclass(frozen=True, kw_only=True)
class DecisionCost:
    """The cost of a decision about one matrix; see `lowmem_gblm.methods.Method`."""

    bytes_per_weight: float = 0
    bytes_per_squared_input: float = 0
    kept_per_squared_input: float = 0
    flops_per_cubed_input: float = 0
    sweeps_columns: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work to be done with the model.

    Attributes:
        process_bytes: Resident memory of the process before any weight is loaded.
        itemsize: Bytes of one number of the computation.
        shares_memory: Whether a resident block shares the memory of what was read.
        resident_bits: Bits of a prunable weight while its block is resident: 4 or 8 with
            `--compute-weights`, else None.
        logits_chunk, tile, slab: Logits that are computed at once, numbers of a sample's gradient
            that are worked on at once, numbers of a matrix that are decided at once.
        context_bytes: Memory of a GPU that its driver and its kernels take.
        row_length: Tokens of a line, where a sample is a batch of lines; else None.
        layout_bytes: Bytes of masks and rotary tables of shared prefixes, kept for all blocks.
        samples_option: What to type for fewer samples; `{}` stands for their number.
        rewrites: Whether pruned blocks are written over the dense ones, by way of the work folder.
        saves, takes: Bytes of the statistics of every block that are saved for later runs, or that
            an earlier run has saved; empty where there are none.
        statistic_bytes: Bytes of the largest of these, in float32.
        text_bytes: Bytes of text that are tokenized in one piece before the first stage.
        candidates, held_out: Candidates for the options of the method, and the windows of `seqlen`
            by which one is chosen; 0 where nothing is to be chosen.
    """

    sizes: ModelSizes
    process_bytes: int
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
    context_bytes: int = 0
    row_length: int | None = None
    layout_bytes: int = 0
    samples_option: str = "--nsamples {}"
    writes: bool = True
    rewrites: bool = False
    saves: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()
    statistic_bytes: int = 0
    text_bytes: int = 0
    candidates: int = 0
    held_out: int = 0

    @property
    def boundary_bytes(self) -> int:
        """Return the bytes of the hidden states of one sample."""
        return self.seqlen * self.sizes.hidden_size * self.itemsize

    @property
    def trials(self) -> int:
        """Return the held-out windows of all candidates together."""
        return self.candidates * self.held_out

    @property
    def compiles_products(self) -> bool:
        """Return whether many products are compiled: experts have other tokens in every sample."""
        routed = self.sizes.active_fraction < 1 and self.schedule.needs_samples
        return routed and compiles_every_shape(self.on_gpu, self.itemsize)

    @property
    def attended(self) -> int:
        """Return the pairs of tokens of one sample that see each other."""
        return self.seqlen * (self.row_length or self.seqlen)


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
        durable_interval: Of the steps of the reverse and the prune sweep every such one is durable;
            what only the steps between them read stays in host memory.
        gradient_precision: Precision of the gradient magnitudes stored between two sweeps.
    """

    read_ahead: bool = True
    copy_ahead: bool = False
    behind_bytes: int = 0
    boundary_interval: int = 1
    accumulator_bytes: int | None = None
    durable_interval: int = 1
    gradient_precision: GradientPrecision = "float32"


def stores(work: Workload, choices: Choices) -> bool:
    """Return whether gradient magnitudes are stored in the work folder, all or those of a part."""
    sliced = work.schedule.keeps_boundaries and choices.accumulator_bytes is not None
    return work.schedule.stores_gradients or sliced


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
