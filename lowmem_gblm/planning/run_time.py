"""How long every pass takes, from what the machine was measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_gblm.planning.memory_use import boundary_bytes
from lowmem_gblm.planning.schedule import reverse_order
from lowmem_gblm.planning.sizes import FLOAT32_BYTES, Choices, ModelSizes, Workload, slices_within

# Passes over hidden states and features that a block's elementwise operations make: per forward,
# and per backward.
_ELEMENTWISE_FORWARD, _ELEMENTWISE_BACKWARD = 12, 24
# Attention reaches this fraction of the rate of products.
_ATTENTION_RATE = 0.3
# Passes over the weights to decide about them, and over the accumulators per sample.
_DECIDING, _ACCUMULATING = 16, 3
_PER_BLOCK_S = 0.02
_PER_COLUMN_S = 0.0002
# Bytes that a processor hashes in a second: every shard's SHA-256 goes into the record.
_HASHED = 1e9


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a machine does in a second.

    Attributes:
        products: FLOPs in products of the model's shapes.
        memory: Bytes read and written by elementwise operations on the device.
        read, write: Bytes from and to the disk.
    """

    products: float
    memory: float
    read: float
    write: float


def durations(
    sizes: ModelSizes, work: Workload, choices: Choices, speeds: Speeds
) -> dict[str, float]:
    """Seconds of every pass.

    Reading and writing run beside the computation: the longer of the two counts.
    """
    clock = _Clock(sizes, work, choices, speeds)
    return {name: clock.seconds(name) for name in (*work.schedule.passes, "finish")}


class _Clock:
    def __init__(self, sizes: ModelSizes, work: Workload, choices: Choices, speeds: Speeds) -> None:
        self._sizes, self._work, self._choices, self._speeds = sizes, work, choices, speeds
        self._tokens = work.nsamples * work.seqlen
        self._weights = sum(sizes.prunable)
        self._met = self._weights * sizes.active_fraction

    def seconds(self, name: str) -> float:
        """Of one pass."""
        return float(getattr(self, f"_{name}")())

    def _embed(self) -> float:
        return self._sizes.rest_bytes / self._speeds.read + self._moved(1)

    def _dry_run(self) -> float:
        runs = self._work.schedule.needs_samples
        computing = self._forward() / self._work.nsamples if runs else 0
        return self._beside(computing, reads=1, boundaries=0)

    def _dense(self) -> float:
        return self._beside(self._forward(), reads=1, boundaries=1 + self._sizes.depth)

    def _head(self) -> float:
        weights = self._sizes.vocab_size * self._sizes.hidden_size
        logits = self._tokens * self._sizes.vocab_size * FLOAT32_BYTES
        # Forward, gradient of the hidden states; log-softmax and its gradient go over the logits.
        products = 4 * self._tokens * weights / self._speeds.products
        return products + 8 * logits / self._speeds.memory + self._moved(2)

    def _reverse(self) -> float:
        order = reverse_order(self._sizes.depth, self._choices.boundary_interval)
        again = sum(not step.backward for step in order) / self._sizes.depth
        numbers = [weights * FLOAT32_BYTES for weights in self._sizes.slots]
        slices = len(slices_within(numbers, self._choices.accumulator_bytes))
        computing = self._forward() * (again + slices) + self._inputs_gradients() * slices
        computing += self._weight_gradients()
        if self._work.schedule.prune_in == "reverse":
            computing += self._decisions()
        boundaries = self._sizes.depth * (2 + again + 2 * slices)
        writes = self._work.schedule.prune_in == "reverse"
        return self._beside(computing, reads=1 + again, boundaries=boundaries, writes=writes)

    def _prune(self) -> float:
        forwards = self._work.schedule.prune_forwards
        computing = forwards * self._forward() + self._decisions()
        if "gram" in self._work.needs:
            grams = 2 * self._tokens * self._sizes.gram_entries * self._sizes.depth
            computing += grams / self._speeds.products
        boundaries = 2 * forwards * self._sizes.depth
        return self._beside(computing, reads=1, boundaries=boundaries, writes=True)

    def _finish(self) -> float:
        if self._work.rewrites:
            return self._sizes.total_bytes / self._speeds.read
        rest = self._sizes.total_bytes - sum(self._sizes.block_bytes)
        return rest / self._speeds.read + rest / self._speeds.write

    def _beside(
        self, computing: float, *, reads: float, boundaries: float, writes: bool = False
    ) -> float:
        blocks = sum(self._sizes.block_bytes)
        moving = reads * blocks / self._speeds.read + self._moved(boundaries)
        moving += writes * blocks * (1 / self._speeds.write + 1 / _HASHED)
        longer, shorter = max(computing, moving), min(computing, moving)
        hidden = longer if self._choices.read_ahead else longer + shorter
        return hidden + self._sizes.depth * _PER_BLOCK_S

    def _moved(self, boundaries: float) -> float:
        one = self._work.nsamples * boundary_bytes(self._sizes, self._work)
        return boundaries * one * (1 / self._speeds.write + 1 / self._speeds.read) / 2

    def _forward(self) -> float:
        """All samples through all blocks."""
        sizes, work = self._sizes, self._work
        attention = 4 * self._tokens * work.seqlen * sizes.hidden_size / 2 * sizes.depth
        products = 2 * self._met * self._tokens
        return (products + attention / _ATTENTION_RATE) / self._speeds.products + self._elementwise(
            _ELEMENTWISE_FORWARD
        )

    def _inputs_gradients(self) -> float:
        """The backward pass but for the gradients of the weights."""
        extra = _ELEMENTWISE_BACKWARD - _ELEMENTWISE_FORWARD
        return self._forward() + self._elementwise(extra)

    def _weight_gradients(self) -> float:
        accumulating = _ACCUMULATING * self._work.nsamples * self._weights * FLOAT32_BYTES
        products = 2 * self._met * self._tokens / self._speeds.products
        return products + accumulating / self._speeds.memory

    def _elementwise(self, passes: int) -> float:
        widths = self._sizes.hidden_size * 2 + self._sizes.feature_widths / 2
        size = self._tokens * widths * FLOAT32_BYTES * self._sizes.depth
        return passes * size / self._speeds.memory

    def _decisions(self) -> float:
        passes = _DECIDING * self._weights * FLOAT32_BYTES / self._speeds.memory
        return passes + (self._sweeps_of_columns() if "gram" in self._work.needs else 0)

    def _sweeps_of_columns(self) -> float:
        """SparseGPT: factors of the gram matrices, then column after column."""
        sizes = self._sizes
        factors = 3 * sizes.gram_entries * sizes.widest_input / self._speeds.products
        return sizes.depth * (factors + sizes.columns * _PER_COLUMN_S)
