"""What tests of interrupted runs share: photographs of the disk; runs that stop or are killed."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lowmem_gblm.storage import atomic

SIGNALS = [signal.SIGINT, signal.SIGTERM]
METHODS = [
    (method, activations)
    for method in ("gblm", "wanda", "sparsegpt", "gradient", "magnitude")
    for activations in ("pruned", "dense")
]
SAMPLED = 6
# A method, its activations, and of how many photographs one is resumed from: CI takes all of the
# method with most steps and a sample of some others, of which all are slow.
KILL_MATRIX = [
    pytest.param(*METHODS[0], 1, id="gblm-pruned"),
    *(
        pytest.param(*METHODS[number], SAMPLED, id=f"{'-'.join(METHODS[number])}-{SAMPLED}")
        for number in (1, 2, 5, 6)
    ),
    *(pytest.param(*one, 1, marks=pytest.mark.slow, id="-".join(one)) for one in METHODS[1:]),
]


def content(folder: Path, *, card: bool = True) -> dict[str, str]:
    """Every file of a finished output but the records of what it took, by its hash.

    Without the `card` where that may say more: results of a comparison, or samples left out.
    """
    left_out = ("pruning.json", "evaluation-compare.json", *([] if card else ["README.md"]))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


class Photographer:
    """Copies what lies on the disk before and after every durable operation of a run."""

    def __init__(self, parent: Path, album: Path) -> None:
        self._parent = parent
        self._album = album
        self._seen: set[str] = set()
        self._lock = threading.RLock()
        self.operations = 0
        self.photographs: list[Path] = []

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename"):
                patch.setattr(atomic.os, name, self.photographed(getattr(os, name)))
            for name in ("unlink", "pwrite"):
                patch.setattr(atomic.os, name, self._held(getattr(os, name)))
            yield

    def photographed(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """The same operation, with a photograph before it and one after it."""

        def wrapped(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.operations += 1
                self._photograph()
                result = operation(*args, **options)
                self._photograph()
                return result

        return wrapped

    def _held(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """Not while a photograph is taken: other threads write and remove, too."""

        def wrapped(*args: Any, **options: Any) -> Any:
            with self._lock:
                return operation(*args, **options)

        return wrapped

    def _photograph(self) -> None:
        target = self._album / f"{len(self.photographs):04}"
        shutil.copytree(self._parent, target)
        state = str(sorted((path.name, _state(path)) for path in target.rglob("*")))
        if state in self._seen:
            shutil.rmtree(target)
        else:
            self._seen.add(state)
            self.photographs.append(target)


def _state(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


class Stop(BaseException):
    """Stands for Ctrl-C at a chosen moment."""


def stopped_at(
    run: Callable[..., Any], folder: Path, stage: str, step: int, **options: Any
) -> None:
    """Run until a step of a stage is done, and no further."""

    def listener(tick: Any) -> None:
        if (tick.stage, tick.step) == (stage, step):
            raise Stop

    with pytest.raises(Stop):
        run(folder, listener=listener, **options)


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the watch see that host memory has run short; returns once it has requested a stop."""
    monkeypatch.setattr("lowmem_gblm.runtime.watchdog.host_resident_bytes", lambda: 1 << 60)
    for thread in threading.enumerate():
        if thread.name == "host-watch":
            thread.join(50)


class Killer:
    """Kills processes at random moments, some and not all, however busy the machine is.

    Args:
        seconds: About how long one takes.
    """

    def __init__(self, seconds: float) -> None:
        self._chance = random.Random(0)
        self._seconds = seconds
        self.kills = 0

    def kills_one(self, action: Callable[[], object]) -> bool:
        """Run an action in a forked process; whether it was killed before its end."""
        killed = _is_killed(action, self._chance.uniform(0, self._seconds))
        self.kills += killed
        self._seconds *= 1.05 if killed else 0.9
        return killed


def _is_killed(action: Callable[[], object], seconds: float) -> bool:
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def ctrl_c(*args: object, **options: object) -> None:
    """Stands for what is interrupted when it is called."""
    raise KeyboardInterrupt
