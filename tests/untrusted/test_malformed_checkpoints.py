"""Every checkpoint of the corpus is refused in one sentence, in time, and leaves nothing behind."""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lowmem_gblm.cli.main import main
from lowmem_gblm.storage.checkpoint import header
from support.damage import Damage, Malformed, link_outside
from support.malformed.corpus import CORPUS, UNUSUAL
from support.tiny_models import save_tiny

TOOLS = Path(__file__).parents[2] / "tools"
LIMIT_S = 30
MOST_MEMORY_KIB = 600 << 10
SAMPLES = ["--nsamples", "1", "--seqlen", "8", "--device", "cpu"]


class TookTooLong(BaseException):
    """No test waits for ever."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in many files. Not to be modified."""
    return save_tiny("llama", tmp_path_factory.mktemp("sharded") / "model", sharded=True)


@pytest.fixture
def prune(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, str], int]:
    """Prunes a folder into `out` by a method. Nobody is asked anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asks {question}"))

    def run(folder: Path, method: str) -> int:
        options = ["--method", method, "--calibration", str(text_file), *SAMPLES]
        with time_limit(LIMIT_S):
            return main(["prune", str(folder), "out", *options])

    return run


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("one", CORPUS, ids=lambda one: one.name)
def test_a_malformed_checkpoint_is_refused_in_one_sentence(
    one: Malformed,
    prune: Callable[[Path, str], int],
    llama: Path,
    sharded: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(sharded if one.sharded else llama, tmp_path / "model"))
    one.damage(folder)
    before = names_in(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = prune(folder, one.method)
    printed = capfd.readouterr()
    said = printed.err.replace(str(folder), "MODEL")
    assert (code, printed.out) == (one.code, "")
    assert re.fullmatch(f"lowmem-gblm: {one.sentence}\n", last_line(said, one)), said
    assert said.rstrip("\n").isprintable() or one.method != "magnitude"
    assert len(said) < 3000
    kept = ["out.partial", "out.work"] if "What is done is kept in out.work" in said else []
    assert names_in(tmp_path) == sorted([*before, *kept])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MOST_MEMORY_KIB


def last_line(said: str, one: Malformed) -> str:
    """All of it; of a run that got as far as to compute, what follows the stages it finished."""
    lines = said.splitlines(keepends=True)
    stages = [line for line in lines if re.match(r"(embed|dense|head|reverse|prune) ", line)]
    assert not stages or one.code == 6
    return "".join(lines[len(stages) :])


@pytest.mark.parametrize("damage", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_only_odd_is_pruned(
    damage: Damage,
    prune: Callable[[Path, str], int],
    llama: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    damage(folder)
    assert prune(folder, "wanda") == 0, capfd.readouterr().err


def test_a_link_may_be_allowed(
    prune: Callable[[Path, str], int],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    link_outside("model.safetensors")(folder)
    assert prune(folder, "magnitude") == 3
    name, allowed = capfd.readouterr().err.split()[-1].split("=")
    monkeypatch.setenv(name, f"/nowhere:{allowed}")
    assert prune(folder, "magnitude") == 0


@pytest.fixture(scope="module")
def readers() -> Iterator[Any]:
    """The loop of tools/fuzz."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        # A folder of caches would be taken for a tool.
        patch.setattr(sys, "dont_write_bytecode", True)
        yield import_module("fuzz_readers")


def test_mutated_headers_and_indexes_are_read_or_refused(readers: Any) -> None:
    figures = readers.fuzz(20_000, seed=1)
    refusals = [
        f"header.py:{number}"
        for number, line in enumerate(Path(header.__file__).read_text().splitlines(), start=1)
        if line.lstrip().startswith("raise ") and "from None" not in line
    ]
    assert figures.accepted > 2_000
    assert set(refusals) <= figures.refused.keys()


@pytest.mark.parametrize(
    ("broken", "harm", "said"),
    [
        ("_check_layout", lambda *_: None, "AssertionError: .*(overlaps|ends beyond)"),
        ("_check_metadata", lambda *_: {}["x"], "KeyError: 'x'"),
        ("_check_metadata", lambda *_: time.sleep(60), "TimeoutError: more than 1.0 s"),
    ],
    ids=["believes", "crashes", "hangs"],
)
def test_a_reader_that_is_broken_is_found_out(
    broken: str, harm: Any, said: str, readers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, broken, harm)
    with pytest.raises(readers.Finding, match=said):
        readers.fuzz(2_000, seed=1)


def test_fuzz_says_what_it_did(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "fuzz", "--inputs", "300", "--seed", "2"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("300 inputs of seed 2: no finding\nspeed ")
    assert not names_in(tmp_path)
