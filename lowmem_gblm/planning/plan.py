"""A plan: what was chosen, what it will take, and the least that a run could take."""

from dataclasses import asdict, dataclass
from typing import Any

from lowmem_gblm.planning.memory_use import Footprint
from lowmem_gblm.planning.sizes import Choices


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that may be used; None for no limit.

    They are those of the complete process, its GPU context included, and of all folders it writes.
    """

    host_bytes: int | None = None
    gpu_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """The bytes of host memory, GPU memory and disk space that a run takes."""

    host_bytes: int
    gpu_bytes: int
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices of a run and what it will take.

    Attributes:
        reasons: Sentences on why the run is not done as it would be without limits.
        minimum: The least that each of the three can be, whatever the other two are.
        host_spill_bytes: Host memory that holds what would otherwise be stored in the work folder.
        boundary_bytes, magnitude_bytes: Most that is stored between passes, of either kind.
        spill_bytes: Most that is stored in the work folder at once.
        statistics_bytes: Bytes of the statistics that are saved for later runs.
        read_bytes: Tensor data read from the checkpoint, and from the statistics of an earlier run.
        written_bytes: Bytes written to the output, to the work folder and to saved statistics.
        flops: Multiplications and additions with weights of decoder blocks.
        seconds: Seconds of every pass; None if the machine was not measured.
        disk_rate: The sweep that asks the most of the disk, and the bytes a second with which it
            would not wait; None likewise.
    """

    stages: tuple[str, ...]
    choices: Choices
    reasons: tuple[str, ...]
    predicted: Requirements
    minimum: Requirements
    footprints: tuple[Footprint, ...]
    host_spill_bytes: int
    boundary_bytes: int
    magnitude_bytes: int
    spill_bytes: int
    output_bytes: int
    statistics_bytes: int
    read_bytes: int
    written_bytes: int
    flops: int
    seconds: dict[str, float] | None
    disk_rate: tuple[str, float] | None

    @property
    def total_seconds(self) -> float | None:
        """Return the seconds of the run."""
        return None if self.seconds is None else sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        stages = {at.name: {"host": at.host, "gpu": at.gpu} for at in self.footprints}
        return asdict(self) | {
            "stages": list(self.stages),
            "reasons": list(self.reasons),
            "footprints": stages,
            "total_seconds": self.total_seconds,
        }
