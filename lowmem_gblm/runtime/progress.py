"""The progress of a run, and an estimate of the time left."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lowmem_gblm.runtime.memory import host_peak_bytes
from lowmem_gblm.runtime.signals import StopFlag


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run: a number of steps, and their share of the cost of the run."""

    name: str
    steps: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Tick:
    """The news that a step of a stage has been taken.

    Attributes:
        step, steps: Steps taken of the stage, and in all.
        stage_s: Seconds since the stage began.
        left_s: Estimated seconds to the end of the run; None before there is an estimate.
        peak_bytes: Largest resident memory so far.
    """

    stage: str
    step: int
    steps: int
    stage_s: float
    left_s: float | None
    peak_bytes: int


Listener = Callable[[Tick], None]


class Progress:
    """A count of the steps of a run's stages, reported to a listener.

    Attributes:
        check: Raises the requested error of `stop`; called before every sample and piece of work.
        waited_seconds: Seconds of each stage in which the computation waited for data.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        listener: Listener | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        self.check = (stop or StopFlag()).check
        self.seconds: dict[str, float] = {}
        self.waited_seconds: dict[str, float] = {}
        self._stages = {stage.name: stage for stage in stages}
        self._listener = listener
        self._total_cost = sum(stage.cost for stage in stages)
        self._finished_cost = 0.0
        self._skipped_cost = 0.0
        self._earlier: dict[str, float] = {}
        self._start = time.monotonic()
        # Spent on stages without cost: no measure of how fast the rest will be.
        self._free_s = 0.0
        self._stage: Stage | None = None
        self._waited = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run the body as the named stage."""
        self._stage = self._stages[name]
        self._step = 0
        self._waited = 0.0
        self._stage_start = time.monotonic()
        yield
        spent = time.monotonic() - self._stage_start
        if not self._stage.cost:
            self._free_s += spent
        self.seconds[name] = round(spent + self._earlier.get(name, 0.0), 3)
        self.waited_seconds[name] = round(self._waited, 3)
        self._finished_cost += self._stage.cost
        self._stage = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Run the body as a time in which the computation waits for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def skip(self, count: int) -> None:
        """Count steps of the current stage that an earlier attempt has done."""
        assert self._stage is not None, "a step belongs to a stage"
        self._step += count
        self._skipped_cost += self._stage.cost * count / self._stage.steps

    def restore(self, name: str, seconds: float) -> None:
        """Add the time that an earlier attempt has spent on a stage."""
        self._earlier[name] = self._earlier.get(name, 0.0) + seconds

    def step(self) -> None:
        """Count a finished step of the current stage and report it; raises as `check` does."""
        assert self._stage is not None, "a step belongs to a stage"
        self.check()
        self._step += 1
        if self._listener is None:
            return
        now = time.monotonic()
        done = self._finished_cost + self._stage.cost * self._step / self._stage.steps
        own = done - self._skipped_cost
        spent = now - self._start - self._free_s
        left_s = spent * (self._total_cost - done) / own if own > 0 else None
        self._listener(
            Tick(
                stage=self._stage.name,
                step=self._step,
                steps=self._stage.steps,
                stage_s=now - self._stage_start,
                left_s=left_s,
                peak_bytes=host_peak_bytes(),
            )
        )

    def total_seconds(self) -> float:
        """Return the seconds since the run began, and those of earlier attempts."""
        return round(time.monotonic() - self._start + sum(self._earlier.values()), 3)
