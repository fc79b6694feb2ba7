"""Sums over the table of steps: bytes on the disk at every moment, FLOPs, bytes that are moved."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_gblm.planning.keys import Key
from lowmem_gblm.planning.sizes import STORES, Choices, Workload
from lowmem_gblm.planning.steps import Step, step_table


@dataclass(frozen=True)
class Moment:
    """Bytes on the disk at the fullest moment of a step.

    Saved statistics are part of `output`; in place, it is the new tensors of the block that is
    being overwritten.
    """

    boundaries: int = 0
    magnitudes: int = 0
    output: int = 0

    @property
    def stored(self) -> int:
        """Return what is stored in the work folder between steps."""
        return self.boundaries + self.magnitudes


@dataclass(frozen=True)
class DiskUse:
    """Bytes stored and written at every moment of a run; the most stored, by kind and in all."""

    moments: Sequence[Moment]
    boundaries: int
    magnitudes: int
    stored: int

    def on_disk(self, room: int) -> int:
        """Return the most that lies on disk where host memory holds `room` bytes of it."""
        return max(max(0, moment.stored - room) + moment.output for moment in self.moments)

    def room_for(self, missing: int) -> int:
        """Return the host memory that makes the need of disk space less by `missing`."""
        allowed = self.on_disk(0) - missing
        return max(0, *(moment.stored + moment.output - allowed for moment in self.moments))


def disk_use(work: Workload, choices: Choices) -> DiskUse:
    """Return what is on the disk at every step; drops are removed beside the next step."""
    # Boundaries and loss gradients, then gradient magnitudes.
    stored = {True: 0, False: 0}
    leaving: Sequence[Key] = ()
    held: set[Key] = set()
    output, overwriting, moments = 0, 0, [Moment()]
    for step in step_table(work, choices):
        on_its_way = [key for key in step.writes if key not in step.held]
        held.update(step.held)
        for key in on_its_way:
            stored[key.is_per_sample] += key_bytes(key, work, choices)
        block = pruned_bytes(step, work)
        output += block * work.writes + saved_bytes(step, work)
        # In place, the new tensors of a block are overwritten beside the next step.
        on_disk = output + overwriting + block * work.rewrites
        moments.append(Moment(stored[True], stored[False], on_disk))
        overwriting = block * work.rewrites
        for key in leaving:
            stored[key.is_per_sample] -= key_bytes(key, work, choices)
        leaving = [key for key in step.drops if key not in held]
        held.difference_update(step.drops)
    output += (work.sizes.outside_bytes + work.sizes.side_bytes) * work.writes
    moments.append(Moment(stored[True], stored[False], output))
    return DiskUse(
        moments,
        boundaries=max(moment.boundaries for moment in moments),
        magnitudes=max(moment.magnitudes for moment in moments),
        stored=max(moment.stored for moment in moments),
    )


def held_bytes(stage: str, work: Workload, choices: Choices) -> int:
    """Return the most that a stage holds in host memory between two durable steps."""
    held: set[Key] = set()
    most = 0
    for step in step_table(work, choices):
        if step.stage == stage:
            held.update(step.held)
            most = max(most, sum(key_bytes(key, work, choices) for key in held))
            held.difference_update(step.drops)
    return most


def key_bytes(key: Key, work: Workload, choices: Choices) -> int:
    """Return the bytes that are stored under a key."""
    if key.is_per_sample:
        counts = {"embedded": work.nsamples + work.held_out, "trial": work.trials}
        return counts.get(key.kind, work.nsamples) * work.boundary_bytes
    return int(work.sizes.prunable[key.index] * STORES[choices.gradient_precision])


def pruned_bytes(step: Step, work: Workload) -> int:
    """Return the bytes of the block that a step prunes, if it does."""
    return work.sizes.block_bytes[step.block or 0] * step.prunes


def saved_bytes(step: Step, work: Workload) -> int:
    """Return the bytes of the statistics that a step saves for later runs."""
    return work.saves[step.block or 0] if step.saves else 0


def step_flops(step: Step, work: Workload) -> int:
    """Return the multiplications and additions of a step with weights of its block."""
    if step.block is None:
        return 0
    weights = work.sizes.prunable[step.block] * work.sizes.active_fraction
    samples = step.flops_per_weight_and_token * work.nsamples + 2 * step.tries * work.trials
    return int(samples * weights * work.seqlen)


def step_reads(step: Step, work: Workload) -> int:
    """Return the bytes that a step reads from the checkpoint, and of saved statistics.

    Statistics are read once more, for their hashes.
    """
    if step.stage in ("embed", "head", "choose"):
        return work.sizes.rest_bytes
    blocks = work.sizes.block_bytes
    taken = (1 + step.prunes) * work.takes[step.block or 0] if step.takes else 0
    return (sum(blocks) if step.block is None else blocks[step.block]) * bool(step.loads) + taken


def read_bytes(work: Workload, choices: Choices) -> int:
    """Return what `step_reads` adds up to; in place, the model is read once more for hashes."""
    copied = work.sizes.outside_bytes * work.writes
    checked = work.sizes.total_bytes * work.rewrites
    return sum(step_reads(step, work) for step in step_table(work, choices)) + copied + checked


def written_bytes(work: Workload, choices: Choices) -> int:
    """Return what a run writes to the output, to the work folder and to saved statistics."""
    table = step_table(work, choices)
    stored = sum(
        key_bytes(key, work, choices)
        for step in table
        for key in step.writes
        if key not in step.held
    )
    blocks = sum(pruned_bytes(step, work) for step in table)
    stored += sum(work.saves)
    return stored + (blocks + work.sizes.outside_bytes) * work.writes + 2 * blocks * work.rewrites
