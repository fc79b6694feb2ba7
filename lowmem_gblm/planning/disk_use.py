"""What lies in the work folder and in the output at every moment of a run."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_gblm.planning.memory_use import boundary_bytes
from lowmem_gblm.planning.schedule import reverse_order
from lowmem_gblm.planning.sizes import Choices, ModelSizes, Workload, stored_bytes


@dataclass(frozen=True)
class DiskUse:
    """What waits and what is written at every moment of a run, in bytes.

    Attributes:
        moments: Boundaries, gradient magnitudes, and the part of the output that is there by then;
            in place, the new tensors of the blocks that are being overwritten.
    """

    moments: tuple[tuple[int, int, int], ...]

    @property
    def boundaries(self) -> int:
        """Most hidden states that wait."""
        return max(boundaries for boundaries, _, _ in self.moments)

    @property
    def magnitudes(self) -> int:
        """Most gradient magnitudes that wait."""
        return max(magnitudes for _, magnitudes, _ in self.moments)

    @property
    def together(self) -> int:
        """Most that waits at once."""
        return max(boundaries + magnitudes for boundaries, magnitudes, _ in self.moments)

    def on_disk(self, room: int) -> int:
        """Most that lies on disk where host memory has so much room for what waits."""
        return max(max(0, waits + more - room) + output for waits, more, output in self.moments)

    def room_for(self, missing: int) -> int:
        """Host memory that makes the need of disk space so much less, if anything can."""
        allowed = self.on_disk(0) - missing
        return max(0, *(waits + more + output - allowed for waits, more, output in self.moments))


def disk_use(sizes: ModelSizes, work: Workload, choices: Choices) -> DiskUse:
    """Follow a run block by block and see what waits."""
    tally = _Tally(sizes, work)
    if work.schedule.needs_samples:
        tally.boundaries(1)
    if "dense" in work.schedule.passes:
        _dense(tally, sizes, work, choices)
    if "reverse" in work.schedule.passes:
        _reverse(tally, sizes, work, choices)
    if "prune" in work.schedule.passes:
        _prune(tally, sizes, work, choices)
    tally.output(sizes.total_bytes - sum(sizes.block_bytes) + sizes.side_bytes)
    return DiskUse(tuple(tally.moments))


class _Tally:
    """Counts what is there, and writes down every moment."""

    def __init__(self, sizes: ModelSizes, work: Workload) -> None:
        self._one = work.nsamples * boundary_bytes(sizes, work)
        self._writes = work.writes
        self._rewrites = work.rewrites
        self._now = [0, 0, 0]
        self._dropped: list[tuple[int, int]] = []
        self._dropping: list[tuple[int, int]] = []
        self.moments = [(0, 0, 0)]

    def boundaries(self, count: int) -> None:
        self._add(0, count * self._one)

    def magnitudes(self, size: int) -> None:
        self._add(1, size)

    def output(self, size: int) -> None:
        self._add(2, size if self._writes else 0)

    def block(self, size: int) -> None:
        """A pruned block is written: to the output, or over the dense one by way of a file."""
        self.output(size)
        if self._rewrites:
            self._add(2, size)
            self._add(2, -size)

    def commit(self) -> None:
        """A step is done: what it takes back is dropped beside the next one."""
        for kind, size in self._dropping:
            self._now[kind] += size
        self._dropping, self._dropped = self._dropped, []

    def _add(self, kind: int, size: int) -> None:
        if size < 0:
            self._dropped.append((kind, size))
            return
        self._now[kind] += size
        boundaries, magnitudes, output = self._now
        self.moments.append((boundaries, magnitudes, output))


def _dense(tally: _Tally, sizes: ModelSizes, work: Workload, choices: Choices) -> None:
    for index in range(sizes.depth):
        tally.boundaries(1)
        if not work.keeps_boundaries or index % choices.boundary_interval:
            tally.boundaries(-1)
        tally.commit()


def _reverse(tally: _Tally, sizes: ModelSizes, work: Workload, choices: Choices) -> None:
    # The gradient at the last boundary takes that boundary's place.
    tally.boundaries(1)
    tally.boundaries(-1)
    tally.commit()
    for step in reverse_order(sizes.depth, choices.boundary_interval):
        if not step.backward:
            tally.boundaries(1)
            tally.commit()
            continue
        tally.boundaries(step.block > 0)
        if work.stores_gradients or choices.accumulator_bytes is not None:
            tally.magnitudes(stored_bytes(sizes.prunable[step.block], choices.gradient_precision))
        tally.boundaries(-1 - (step.block > 0))
        if not work.stores_gradients:
            tally.block(sizes.block_bytes[step.block])
            if choices.accumulator_bytes is not None:
                tally.magnitudes(
                    -stored_bytes(sizes.prunable[step.block], choices.gradient_precision)
                )
        tally.commit()


def _prune(tally: _Tally, sizes: ModelSizes, work: Workload, choices: Choices) -> None:
    for index in range(sizes.depth):
        if work.schedule.needs_samples and index + 1 < sizes.depth:
            tally.boundaries(1)
        tally.block(sizes.block_bytes[index])
        if work.stores_gradients:
            tally.magnitudes(-stored_bytes(sizes.prunable[index], choices.gradient_precision))
        if work.schedule.needs_samples:
            tally.boundaries(-1)
        tally.commit()
