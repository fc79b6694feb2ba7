"""How long every stage takes: totals of the table of steps, over the speed of the machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_gblm.planning.keys import Key
from lowmem_gblm.planning.sizes import FLOAT32_BYTES, Choices, Workload
from lowmem_gblm.planning.steps import Step, step_table
from lowmem_gblm.planning.totals import key_bytes, pruned_bytes, saved_bytes, step_reads

# How often elementwise operations read or write a number: of the features in a forward pass, of
# the logits, of the weights to decide about them.
_ELEMENTWISE = 12
# What short operations take, however small their tensors are: of a sample's forward pass through
# a block, and of SparseGPT's decision about a column.
_PER_SAMPLE_S = 0.001
_PER_COLUMN_S = 0.0002


@dataclass(frozen=True, kw_only=True)
class MachineSpeed:
    """The speed of a machine, in a second.

    Attributes:
        flops_s: FLOPs in multiplications with the model's matrices.
        memory_bytes_s: Bytes read and written by elementwise operations on the device.
        read_bytes_s, write_bytes_s: Bytes read from the disk, and written to it and flushed.
    """

    flops_s: float
    memory_bytes_s: float
    read_bytes_s: float
    write_bytes_s: float


def run_time(work: Workload, choices: Choices, speed: MachineSpeed) -> dict[str, float]:
    """Return the seconds of every stage.

    Reading and writing run beside the computation, and the longer of the two counts; where no block
    is read ahead, their sum.
    """
    clock = _Clock(work, choices, speed)
    seconds = {stage: clock.stage_s(stage) for stage in work.schedule.stages}
    return seconds | {"finish": clock.finish_s()}


def disk_rate(work: Workload, choices: Choices, speed: MachineSpeed) -> tuple[str, float]:
    """Return the sweep that asks the most of the disk, and its bytes read and written a second.

    With a disk of that rate no sweep would wait, whatever the system holds in memory.
    """
    clock = _Clock(work, choices, speed)
    sweeps = [stage for stage in work.schedule.stages if stage in ("dense", "reverse", "prune")]
    rates = {stage: sum(clock.moved_bytes(stage)) / clock.computing_s(stage) for stage in sweeps}
    return max(rates.items(), key=lambda rate: rate[1])


class _Clock:
    """Seconds of steps on one machine."""

    def __init__(self, work: Workload, choices: Choices, speed: MachineSpeed) -> None:
        self._sizes, self._work, self._choices, self._speed = work.sizes, work, choices, speed
        self._table = step_table(work, choices)
        self._held = {key for step in self._table for key in step.held}
        self._tokens = work.nsamples * work.seqlen
        # The prunable weights of a block, on average.
        self._block_weights = sum(work.sizes.prunable) / work.sizes.depth

    def stage_s(self, stage: str) -> float:
        return self._beside_s(self.computing_s(stage), *self.moved_bytes(stage))

    def computing_s(self, stage: str) -> float:
        return sum(map(self._computing_of_step_s, self._steps(stage)))

    def moved_bytes(self, stage: str) -> tuple[float, float]:
        """Return the bytes that are read from the disk, and those that are written to it."""
        steps = self._steps(stage)
        stored = [self._stored(step.reads) * max(1, step.forwards) for step in steps]
        reads = sum(step_reads(step, self._work) for step in steps) + sum(stored)
        writes = sum(self._stored(step.writes) + self._written(step) for step in steps)
        return reads, writes

    def finish_s(self) -> float:
        """Return the seconds of copying what no block holds; in place, of hashing everything."""
        if self._work.rewrites:
            return self._beside_s(0, self._sizes.total_bytes, 0)
        return self._beside_s(0, self._sizes.outside_bytes, self._sizes.outside_bytes)

    def _computing_of_step_s(self, step: Step) -> float:
        if step.stage == "head":
            # The logits, and the gradient of the hidden states.
            logits = self._tokens * self._sizes.vocab_size
            return self._computing_s(4 * logits * self._sizes.hidden_size, logits)
        if step.stage == "choose":
            logits = self._work.trials * self._work.seqlen * self._sizes.vocab_size
            return self._computing_s(2 * logits * self._sizes.hidden_size, logits)
        if step.stage == "dry_run":
            one_sample = self._work.schedule.needs_samples / self._work.nsamples
            return one_sample * self._sizes.depth * self._forward_s()
        # A backward pass to the hidden states takes about as long as a forward pass.
        forwards = step.forwards + step.tries * self._work.trials / self._work.nsamples
        seconds = (forwards + step.backwards) * self._forward_s()
        if step.weight_gradients:
            seconds += self._weight_gradients_s()
        decisions = step.prunes + step.tries * self._work.candidates
        return seconds + self._decisions_s() * decisions

    def _steps(self, stage: str) -> list[Step]:
        return [step for step in self._table if step.stage == stage]

    def _stored(self, keys: Sequence[Key]) -> int:
        """Return the bytes of what is on the disk of these keys, and not held in host memory."""
        on_disk = [key for key in keys if key not in self._held]
        return sum(key_bytes(key, self._work, self._choices) for key in on_disk)

    def _written(self, step: Step) -> int:
        return pruned_bytes(step, self._work) + saved_bytes(step, self._work)

    def _beside_s(self, computing_s: float, read_bytes: float, write_bytes: float) -> float:
        """Return the seconds of computing with reading and writing beside it."""
        moving_s = read_bytes / self._speed.read_bytes_s + write_bytes / self._speed.write_bytes_s
        both_s = computing_s + moving_s
        return max(computing_s, moving_s) if self._choices.read_ahead else both_s

    def _computing_s(self, flops: float, numbers: float) -> float:
        """Return the seconds of multiplications, and of elementwise operations on numbers."""
        elementwise_bytes = _ELEMENTWISE * numbers * FLOAT32_BYTES
        return flops / self._speed.flops_s + elementwise_bytes / self._speed.memory_bytes_s

    def _forward_s(self) -> float:
        sizes, work = self._sizes, self._work
        attention = 4 * work.nsamples * work.attended * sizes.hidden_size
        flops = self._tokens * 2 * self._block_weights * sizes.active_fraction + attention
        features = self._tokens * (2 * sizes.hidden_size + sizes.feature_widths / 2)
        return self._computing_s(flops, features) + work.nsamples * _PER_SAMPLE_S

    def _weight_gradients_s(self) -> float:
        flops = 2 * self._tokens * self._block_weights * self._sizes.active_fraction
        # A gradient is read, an accumulator read and written.
        accumulated_bytes = 3 * self._work.nsamples * self._block_weights * FLOAT32_BYTES
        return flops / self._speed.flops_s + accumulated_bytes / self._speed.memory_bytes_s

    def _decisions_s(self) -> float:
        sizes, cost = self._sizes, self._work.deciding
        # Statistics of activations; factors of matrices [in, in]; columns one after the other.
        flops: float = self._tokens * self._work.activations.flops_per_token
        flops += cost.flops_per_cubed_input * sizes.squared_inputs * sizes.widest_input
        columns_s = sizes.columns * _PER_COLUMN_S * cost.sweeps_columns
        return self._computing_s(flops, self._block_weights) + columns_s
