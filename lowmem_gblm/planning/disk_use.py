"""The bytes in the work folder and in the output after every step: the running sum of the table."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_gblm.planning.memory_use import boundary_bytes
from lowmem_gblm.planning.sizes import Choices, ModelSizes, Workload, stored_bytes
from lowmem_gblm.planning.steps import Key, Step


@dataclass(frozen=True)
class Moment:
    """Bytes on the disk at the fullest moment of a step.

    In place, `output` is the new tensors of the block that is being overwritten.
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
    """The bytes that are stored and written at every moment of a run."""

    moments: tuple[Moment, ...]

    @property
    def boundaries(self) -> int:
        """Return the most hidden states that are stored at once."""
        return max(moment.boundaries for moment in self.moments)

    @property
    def magnitudes(self) -> int:
        """Return the most gradient magnitudes that are stored at once."""
        return max(moment.magnitudes for moment in self.moments)

    @property
    def stored(self) -> int:
        """Return the most that is stored at once."""
        return max(moment.stored for moment in self.moments)

    def on_disk(self, room: int) -> int:
        """Return the most that lies on disk where host memory holds `room` bytes of it."""
        return max(max(0, moment.stored - room) + moment.output for moment in self.moments)

    def room_for(self, missing: int) -> int:
        """Return the host memory that makes the need of disk space less by `missing`."""
        allowed = self.on_disk(0) - missing
        return max(0, *(moment.stored + moment.output - allowed for moment in self.moments))


def disk_use(table: Sequence[Step], sizes: ModelSizes, work: Workload, choices: Choices) -> DiskUse:
    """Return what is stored at every step of a table; drops are removed beside the next step."""
    # Boundaries and loss gradients, then gradient magnitudes.
    stored = {True: 0, False: 0}
    leaving: Sequence[Key] = ()
    output, overwriting, moments = 0, 0, [Moment()]
    for step in table:
        for key in step.writes:
            stored[key.is_per_sample] += key_bytes(key, sizes, work, choices)
        block = sizes.block_bytes[step.block or 0] * step.prunes
        output += block * work.writes
        # In place, the new tensors of a block are overwritten beside the next step.
        on_disk = output + overwriting + block * work.rewrites
        moments.append(Moment(stored[True], stored[False], on_disk))
        overwriting = block * work.rewrites
        for key in leaving:
            stored[key.is_per_sample] -= key_bytes(key, sizes, work, choices)
        leaving = step.drops
    rest = sizes.total_bytes - sum(sizes.block_bytes) + sizes.side_bytes
    moments.append(Moment(stored[True], stored[False], output + rest * work.writes))
    return DiskUse(tuple(moments))


def key_bytes(key: Key, sizes: ModelSizes, work: Workload, choices: Choices) -> int:
    """Return the bytes that are stored under a key."""
    if key.is_per_sample:
        return work.nsamples * boundary_bytes(sizes, work)
    return stored_bytes(sizes.prunable[key.index], choices.gradient_precision)
