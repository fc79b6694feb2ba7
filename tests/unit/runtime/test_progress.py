"""The time that is left, against a clock that is told how fast to go."""

from __future__ import annotations

import pytest

from lowmem_gblm.runtime.progress import Progress, Stage, Tick


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_what_costs_nothing_says_nothing_of_the_rest(clock: list[float]) -> None:
    ticks: list[Tick] = []
    stages = [Stage(name="dry_run", steps=1, cost=0), Stage(name="prune", steps=4, cost=8)]
    progress = Progress(stages, ticks.append)
    for name, steps, step_s in (("dry_run", 1, 1000), ("prune", 4, 3)):
        with progress.stage(name):
            for _ in range(steps):
                clock[0] += step_s
                progress.step()
    assert [tick.left_s for tick in ticks] == [None, 9, 6, 3, 0]
    assert progress.seconds == {"dry_run": 1000, "prune": 12}
    assert progress.total_seconds() == 1012


def test_what_was_done_earlier_says_nothing_of_the_rest(clock: list[float]) -> None:
    ticks: list[Tick] = []
    progress = Progress([Stage(name="prune", steps=4, cost=8)], ticks.append)
    progress.restore("prune", 50)
    with progress.stage("prune"):
        progress.skip(2)
        for _ in range(2):
            clock[0] += 3
            progress.step()
    assert [tick.left_s for tick in ticks] == [3, 0]
    assert progress.seconds == {"prune": 56}
