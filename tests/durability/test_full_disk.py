"""A disk that fills up or fails: a sentence, an exit code, and a job that can be resumed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import DiskError, DiskFull
from lowmem_gblm.storage import atomic
from lowmem_gblm.storage.disk_errors import blamed, explained
from lowmem_gblm.storage.locking import MARK, OwnedFolder
from support.tiny_models import save_tiny

SHARES = (0.002, 0.01, 0.15, 0.45, 0.7, 0.9)
ROOM = "64m"
SIZE = ("--nsamples", "4", "--seqlen", "32", "--disk", "1GiB")
WHAT = (
    r"(the shard|the hidden states before block \d|the gradients before block \d|the journal|"
    r"the gradient magnitudes of block \d|the description of the job|the index|the record|"
    r"the model card|the mark of the folder|the file [\w.-]+)"
)
NEEDS = r"[\d.]+ [KMG]?i?B more are needed in \S+ and [\d.]+ [KMG]?i?B are free"
WAY_OUT = (
    r"then give the same command again(, or lowmem-gblm resume \S+, which resumes from what is "
    r"done|; nothing was done yet that could be kept)"
)
FULL = rf"lowmem-gblm: the disk is full: {WHAT} could not be written to \S+, {NEEDS}: make room, "
FAILING = (
    rf"lowmem-gblm: a disk is failing \(Input/output error\): {WHAT} could not be written to or "
    rf"read from \S+: look after that disk, "
)
# How many calls of an operation fail, each in a run; a failing disk differs in the sentence only.
TIMES = {errno.ENOSPC: 4, errno.EIO: 3}
SENTENCES = {errno.ENOSPC: (4, FULL + WAY_OUT), errno.EIO: (2, FAILING + WAY_OUT)}
Prune = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("full") / "model", blocks=2, width=32)


@pytest.fixture
def prune(model: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> Prune:
    """Runs the command; returns its exit code and its last line on stderr. No traceback ever."""

    def prune(output: Path, *more: str) -> tuple[int, str]:
        calibration = ("--calibration", str(text_file))
        return told(["prune", str(model), str(output), *calibration, *SIZE, *more], capsys)

    return prune


@pytest.fixture
def resume(capsys: pytest.CaptureFixture[str]) -> Prune:
    return lambda folder: told(["resume", str(folder), "--disk", "1GiB"], capsys)


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(argv)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, (error.splitlines() or [""])[-1]


def content(folder: Path) -> dict[str, str]:
    """Every file of a finished output but the record, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "pruning.json"
    }


@pytest.fixture(scope="module")
def expected(
    model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """What an undisturbed run writes, by `--activations`."""
    folder, found = tmp_path_factory.mktemp("expected"), {}
    for activations in ("pruned", "dense"):
        output = folder / activations
        options: dict[str, Any] = {"nsamples": 4, "seqlen": 32, "calibration": str(text_file)}
        lowmem_gblm.prune(model, output, activations=activations, **options)
        found[activations] = content(output)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory of a size in bytes, or gives the mounted one another size."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        again = ["-o", f"remount,size={size}"] if folder.exists() else ["-o", f"size={size}"]
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("share", SHARES)
def test_a_full_disk_is_a_sentence_and_the_job_goes_on_once_there_is_room(
    share: float,
    activations: str,
    model: Path,
    text_file: Path,
    small_disk: Callable[[str], Path],
    prune: Prune,
    resume: Prune,
    expected: dict[str, dict[str, str]],
) -> None:
    options = {"nsamples": 4, "seqlen": 32, "calibration": str(text_file)}
    made = lowmem_gblm.plan(model, activations=activations, **options)
    folder = small_disk(str(max(4096, int(share * made["predicted"]["disk_bytes"]))))
    code, line = prune(folder / "out", "--activations", activations)
    assert (code, bool(re.fullmatch(FULL + WAY_OUT, line))) == (4, True), line
    assert not (folder / "out").exists()
    assert (folder / "out.work").exists() == ("lowmem-gblm resume" in line)
    small_disk(ROOM)
    if "lowmem-gblm resume" in line:
        assert resume(folder / "out.work")[0] == 0
    else:
        assert prune(folder / "out", "--activations", activations)[0] == 0
    assert content(folder / "out") == expected[activations]
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_some_of_these_disks_keep_a_job_to_go_on_with(
    small_disk: Callable[[str], Path], prune: Prune
) -> None:
    folder = small_disk(str(200 << 10))
    _, line = prune(folder / "out")
    assert f"lowmem-gblm resume {folder / 'out.work'}, which resumes from what is done" in line


class Faults:
    """Makes calls of one function of the system fail, from the n-th on."""

    def __init__(self, number: int, at: int) -> None:
        self._number = number
        self._at = at
        self.calls = 0

    def around(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls >= self._at:
                raise OSError(self._number, os.strerror(self._number))
            return operation(*args, **options)

        return wrapped


def count_calls(prune: Prune, output: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often an undisturbed run calls a function."""
    faults = Faults(errno.EIO, 1 << 30)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, name, faults.around(getattr(os, name)))
        assert prune(output)[0] == 0
    return faults.calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("name", ["pwrite", "fsync", "rename"])
def test_an_operation_that_fails_at_any_time_is_a_sentence_and_the_job_goes_on(
    name: str,
    number: int,
    prune: Prune,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_calls(prune, tmp_path / "counted", name, monkeypatch)
    code, sentence = SENTENCES[number]
    for at in sorted({*range(1, calls, max(1, calls // TIMES[number])), calls - 1, calls}):
        folder = tmp_path / str(at)
        folder.mkdir()
        with monkeypatch.context() as patch:
            faults = Faults(number, at)
            patch.setattr(atomic.os, name, faults.around(getattr(os, name)))
            found, line = prune(folder / "out")
        assert (found, bool(re.fullmatch(sentence, line))) == (code, True), (at, calls, line)
        assert not (folder / "out").exists(), at
        assert prune(folder / "out")[0] == 0
        assert content(folder / "out") == expected["pruned"], at
        assert [path.name for path in folder.iterdir()] == ["out"]


def test_short_writes_are_gone_on_with(
    prune: Prune,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pwrite = os.pwrite

    def half(descriptor: int, data: memoryview, offset: int) -> int:
        return pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(atomic.os, "pwrite", half)
    assert prune(tmp_path / "out")[0] == 0
    assert content(tmp_path / "out") == expected["pruned"]


def test_a_disk_that_takes_nothing_is_failing(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.os, "pwrite", lambda descriptor, data, offset: 0)
    code, line = prune(tmp_path / "out")
    assert code == 2
    assert "a disk is failing (nothing was written): the description of the job could not" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_side_file_that_does_not_fit_is_named(
    name: str,
    prune: Prune,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = os.open

    def full(path: Any, *args: Any, **options: Any) -> int:
        if Path(path) == tmp_path / "out.partial" / f"{name}.tmp":
            path = "/dev/full"
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "open", full)
        code, line = prune(tmp_path / "out")
    assert code == 4
    assert f"the disk is full: the file {name} could not be written to" in line
    assert prune(tmp_path / "out")[0] == 0
    assert content(tmp_path / "out") == expected["pruned"]


@pytest.mark.parametrize("place", ["model.safetensors", "dense-1"])
def test_a_file_that_cannot_be_read_any_more_is_named(
    place: str,
    model: Path,
    prune: Prune,
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preadv = os.preadv

    def failing(descriptor: int, *args: Any) -> int:
        if f"{place}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        code, line = prune(tmp_path / "out")
    assert code == 2
    assert re.search(rf"could not be written to or read from \S+{place}: look after", line)
    assert prune(tmp_path / "out")[0] == 0
    assert content(tmp_path / "out") == expected["pruned"]


def test_an_evaluation_on_a_full_disk_says_where_there_is_none(
    model: Path,
    text_file: Path,
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = small_disk("16k")
    argv = ["eval", str(model), "--text", str(text_file), "--seqlen", "64", "--windows", "8"]
    code, line = told([*argv, "--work-dir", str(folder), "--disk", "1GiB"], capsys)
    assert code == 4
    assert re.search(rf"the disk is full: {WHAT} could not be written to \S+, ", line)
    assert f"are needed in {folder} and " in line
    assert line.endswith("then give the same command again, or give another --work-dir")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.ENOSPC, DiskFull, "the disk is full: the journal could not be written to w/000001."),
        (errno.EDQUOT, DiskFull, "the disk quota is used up: the journal could not be written to"),
        (errno.EROFS, DiskError, r"a disk is failing \(Read-only file system\): the journal could"),
    ],
)
def test_every_kind_of_trouble_has_its_sentence(
    number: int, kind: type[Exception], sentence: str
) -> None:
    error = OSError(number, os.strerror(number))
    with suppress(OSError), blamed(Path("w/000001.json.tmp"), "the journal"):
        raise error
    with pytest.raises(kind, match=sentence):
        raise explained(error, "1 B more is needed", "go on")


def test_the_exit_codes_of_full_and_failing_disks() -> None:
    assert (DiskFull.exit_code, DiskError.exit_code) == (4, 2)


def test_a_folder_that_was_made_and_not_yet_marked_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    OwnedFolder(tmp_path / "own").close()
    assert [path.name for path in (tmp_path / "own").iterdir()] == [MARK]


def test_the_mark_of_a_folder_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnedFolder(tmp_path / "own")
    (tmp_path / "own" / "a").write_text(json.dumps({}))
    seen: list[list[str]] = []

    def watching(path: Path, **options: Any) -> None:
        seen.append([child.name for child in path.iterdir()])

    monkeypatch.setattr("lowmem_gblm.storage.locking.shutil.rmtree", watching)
    own.remove()
    assert seen == [[MARK]]
