"""The memory that every pass takes, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowmem_gblm.planning.sizes import FLOAT32_BYTES, Choices, Workload, slices_within
from lowmem_gblm.planning.totals import held_bytes

# Loaded later by Python and the libraries, or kept by the allocator for itself.
_PROCESS_BYTES = 24 << 20
# Kept by the allocator between blocks if it takes only very large pieces from the system: from
# this size of a boundary on (`memory.settle_allocator`).
_HOLES_BYTES, _HOLES_FROM_BYTES = 16 << 20, 1 << 20
# Code that oneDNN keeps for products in half precision (`lowmem_gblm.__init__`).
_COMPILED_BYTES = 128 * 1200 << 10
# Most that torch keeps of a GPU for streams between which freed memory is not shared.
_KEPT_BYTES = 256 << 20
# Tokenizer, text, and the code that reads them.
_TEXT_BYTES = 40 << 20
# What a tokenizer takes for a byte of text: pieces, offsets, and the lists of what it returns.
_PER_TEXT_BYTE = 110
# Copied at once from checkpoint to checkpoint.
_PIECE_BYTES = 1 << 24
# float32 tensors of the numbers that are decided at once.
_DECIDING = 6
# The allocator holds more than what is in use: a factor of the tensors that come and go.
_ALLOCATOR_SLACK = 1.1
# The share of a sample's tensors whose memory on a GPU decisions cannot use again, as it is in
# pieces of other sizes; simulated.
_KEPT_OF_SAMPLE = 0.2
# Hidden-sized and feature-sized tensors of one sample that are alive at once.
_FORWARD_HIDDEN, _FORWARD_FEATURES = 6, 1.0
_GRAPH_HIDDEN, _GRAPH_FEATURES = 14, 2.5
# Tensors of one chunk of logits alive at once in the loss: logits, log-softmax, gradients.
_LOGITS_ALIVE = 4
# Tensors [heads, T, T] alive at once if attention computes them: forward, and in a graph.
_ATTENTION_FORWARD, _ATTENTION_GRAPH = 2, 4
# Bytes of a weight in 4 and 8 bits, with a float32 scale for every 64 or 256 weights.
_PACKED_BYTES = {4: 0.5 + 4 / 64, 8: 1 + 4 / 256}
# Samples on their way to the device: the current one and the next.
_ARRIVING = 2

Parts = dict[str, int]
# The pass before the first stage.
TOKENIZING = "text"


@dataclass
class Footprint:
    """The memory that one pass takes at its fullest moment: bytes by purpose."""

    name: str
    host: Parts = field(default_factory=dict)
    gpu: Parts = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory."""
        return sum(self.host.values())

    @property
    def gpu_bytes(self) -> int:
        """Return the bytes of GPU memory."""
        return sum(self.gpu.values())


def footprints(work: Workload, choices: Choices) -> list[Footprint]:
    """Return the footprints of all passes."""
    added = {
        "embed": _outside,
        "dry_run": _dense,
        "dense": _dense,
        "head": _outside,
        "reverse": _reverse,
        "search": _search,
        "choose": _outside,
        "prune": _prune,
        "finish": _finish,
    }
    process = work.process_bytes + _PROCESS_BYTES + _TEXT_BYTES * work.schedule.needs_samples
    if work.schedule.needs_samples and work.boundary_bytes >= _HOLES_FROM_BYTES:
        process += _HOLES_BYTES
    tokenizing = {
        "the process itself": process,
        "text and tokens": _PER_TEXT_BYTE * work.text_bytes,
    }
    found = [Footprint(TOKENIZING, host=tokenizing)] if work.text_bytes else []
    for name in (*work.schedule.stages, "finish"):
        footprint = Footprint(name, host={"the process itself": process})
        if work.on_gpu:
            footprint.gpu["the driver itself"] = work.context_bytes
            footprint.gpu["kept for its streams"] = min(_KEPT_BYTES, work.sizes.largest_matrix)
        added[name](footprint, work, choices)
        if work.compiles_products:
            footprint.host["compiled products"] = _COMPILED_BYTES
        if work.layout_bytes:
            _computing(footprint, work)["layouts of shared prefixes"] = work.layout_bytes
        if choices.durable_interval > 1:
            footprint.host["hidden states between two steps"] = held_bytes(name, work, choices)
        found.append(footprint)
    return found


def peaks(passes: Sequence[Footprint]) -> tuple[int, int]:
    """Return the bytes of host memory and of GPU memory at the fullest moment of a run."""
    return max(one.host_bytes for one in passes), max(one.gpu_bytes for one in passes)


def _outside(at: Footprint, work: Workload, choices: Choices) -> None:
    """Add embeddings and head: the model without its blocks."""
    sizes = work.sizes
    converted = sizes.rest_weights * work.itemsize
    at.host["embeddings and head"] = sizes.rest_bytes
    if work.on_gpu:
        at.gpu["embeddings and head"] = converted
        # torch keeps pinned memory for the next sweep.
        at.host["blocks as read"] = _as_read(work, choices) * (at.name != "embed")
    elif not work.shares_memory:
        at.host["embeddings and head"] += converted
    needed = 8 * work.seqlen * sizes.hidden_size * max(work.itemsize, FLOAT32_BYTES)
    if at.name != "embed":
        logits = min(work.seqlen * sizes.vocab_size, max(work.logits_chunk, sizes.vocab_size))
        needed += _LOGITS_ALIVE * logits * FLOAT32_BYTES
    _computing(at, work)["one sample"] = _slack(needed)
    _carried(at, work, choices)


def _dense(at: Footprint, work: Workload, choices: Choices) -> None:
    _blocks(at, work, choices)
    if work.schedule.needs_samples:
        _computing(at, work)["one sample"] = _forward(work)
        _carried(at, work, choices)


def _reverse(at: Footprint, work: Workload, choices: Choices) -> None:
    _blocks(at, work, choices)
    accumulators = accumulator_bytes(work, choices)
    computing = _computing(at, work)
    computing["gradient accumulators"] = accumulators
    computing["one sample"] = _slack(_graph(work))
    if work.on_gpu:
        at.host["gradient magnitudes on their way"] = 2 * accumulators
    elif work.schedule.stores_gradients and work.sizes.depth > 1:
        # Those of the block before, while this one is measured.
        at.host["gradient magnitudes on their way"] = min(choices.behind_bytes, accumulators)
    _carried(at, work, choices)
    if work.schedule.prune_in == "reverse":
        _activations(at, work)
        _saved_statistics(at, work)


def _search(at: Footprint, work: Workload, choices: Choices) -> None:
    """Add what pruning takes, the dense matrices of the block, and a byte for every decision."""
    _prune(at, work, choices)
    kept = max(work.sizes.block_bytes) + max(work.sizes.prunable)
    _computing(at, work)["dense matrices and the candidates' decisions"] = kept


def _prune(at: Footprint, work: Workload, choices: Choices) -> None:
    _blocks(at, work, choices)
    _activations(at, work)
    _saved_statistics(at, work)
    runs_samples = work.schedule.prune_forwards or at.name == "search"
    running = _forward(work) if runs_samples else 0
    deciding = _deciding(work, choices)
    computing = _computing(at, work)
    if running > deciding:
        computing["one sample"] = running
    else:
        kept = int(_KEPT_OF_SAMPLE * running) if work.on_gpu else 0
        computing["one decision"] = deciding + kept
    if work.schedule.needs_samples:
        _carried(at, work, choices)
    if work.on_gpu and work.schedule.stores_gradients:
        matrix = _pinned(work.sizes.largest_matrix * FLOAT32_BYTES)
        at.host["gradient magnitudes on their way"] = 2 * matrix


def _finish(at: Footprint, work: Workload, choices: Choices) -> None:
    at.host["copying"] = min(_PIECE_BYTES, work.sizes.outside_bytes)


def _blocks(at: Footprint, work: Workload, choices: Choices) -> None:
    sizes = work.sizes
    block, weights = max(sizes.block_bytes), max(sizes.prunable)
    at.host["blocks as read"] = _as_read(work, choices)
    if work.resident_bits is not None:
        # The remaining tensors of the block stay unpacked, and one matrix is unpacked at a time.
        packed = int(weights * _PACKED_BYTES[work.resident_bits]) + max(0, block - 2 * weights)
        _computing(at, work)["packed block"] = packed + 2 * sizes.largest_matrix * work.itemsize
        if not work.shares_memory:
            at.host["block to be packed"] = weights * work.itemsize
    elif work.on_gpu:
        copies = 1 + (choices.copy_ahead and sizes.depth > 1)
        converted = 0 if block <= weights * work.itemsize * 1.1 else weights * work.itemsize
        at.gpu["resident block"] = block * copies + converted
    elif not work.shares_memory:
        at.host["resident block"] = weights * work.itemsize


def _as_read(work: Workload, choices: Choices) -> int:
    """Return the bytes of the buffers into which blocks are read: one more to read ahead."""
    block = max(work.sizes.block_bytes)
    count = 1 + (choices.read_ahead and work.sizes.depth > 1)
    return count * (_pinned(block) if work.on_gpu else block)


def _pinned(size_bytes: int) -> int:
    """Return the bytes that torch takes for pinned memory: the next power of two."""
    return 1 << max(0, size_bytes - 1).bit_length()


def accumulator_bytes(work: Workload, choices: Choices) -> int:
    """Return the bytes of float32 sums of the largest part of a block accumulated at once."""
    numbers = work.sizes.accumulators
    parts = slices_within(numbers, choices.accumulator_bytes)
    return max(sum(numbers[item] for item in part) for part in parts)


def _activations(at: Footprint, work: Workload) -> None:
    held = work.activations.entries + work.activations.largest_entries
    if held:
        _computing(at, work)["statistics of activations"] = held * FLOAT32_BYTES


def _saved_statistics(at: Footprint, work: Workload) -> None:
    """Add a statistic on its way to its file, or from it: as stored, and in float32."""
    if work.statistic_bytes:
        at.host["one saved statistic"] = 2 * work.statistic_bytes
        if work.on_gpu and work.takes:
            at.gpu["one saved statistic"] = 2 * work.statistic_bytes


def _deciding(work: Workload, choices: Choices) -> int:
    """Return the bytes of one matrix: its statistics, the method's, and a copy on a GPU."""
    sizes, cost = work.sizes, work.deciding
    needed = cost.bytes_per_weight * sizes.largest_matrix
    needed += cost.bytes_per_squared_input * sizes.widest_input**2
    needed += cost.kept_per_squared_input * sizes.squared_inputs
    needed += _DECIDING * min(work.slab, sizes.largest_matrix) * FLOAT32_BYTES
    if work.schedule.stores_gradients:
        # Of this matrix and, ahead, of the next one; a GPU may not have done with the one before.
        held = 1 + choices.read_ahead + work.on_gpu
        needed += held * sizes.largest_matrix * FLOAT32_BYTES
    stored = max(sizes.block_bytes) / max(sizes.prunable)
    if work.on_gpu and (work.resident_bits is not None or stored > 1.1 * work.itemsize):
        needed += sizes.largest_matrix * stored
    return int(needed)


def _forward(work: Workload) -> int:
    sizes = work.sizes
    numbers = _FORWARD_HIDDEN * sizes.hidden_size + _FORWARD_FEATURES * sizes.feature_widths
    return _slack(work.seqlen * numbers * work.itemsize + _attention(work, _ATTENTION_FORWARD))


def _graph(work: Workload) -> int:
    """Return the bytes of one sample with its graph, and the current piece of a gradient."""
    sizes = work.sizes
    numbers = _GRAPH_HIDDEN * sizes.hidden_size + _GRAPH_FEATURES * sizes.feature_widths
    tile = min(sizes.largest_matrix, work.tile)
    needed = work.seqlen * numbers * work.itemsize + 2 * tile * FLOAT32_BYTES
    return int(needed) + _attention(work, _ATTENTION_GRAPH)


def _attention(work: Workload, alive: int) -> int:
    matrices = alive * work.sizes.heads * work.sizes.attention_matrices
    return matrices * work.attended * FLOAT32_BYTES


def _carried(at: Footprint, work: Workload, choices: Choices) -> None:
    """Add hidden states on their way between the device and the work folder."""
    one = work.boundary_bytes
    streams = 2 if at.name == "reverse" else 1
    carried = streams * one * _ARRIVING + min(choices.behind_bytes, 2 * one) + one
    at.host["hidden states on their way"] = carried
    if work.on_gpu:
        at.gpu["hidden states on their way"] = carried


def _computing(at: Footprint, work: Workload) -> Parts:
    return at.gpu if work.on_gpu else at.host


def _slack(numbers: float) -> int:
    return int(numbers * _ALLOCATOR_SLACK)
