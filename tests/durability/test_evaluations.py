"""An interrupted evaluation is resumed by the same call, and leaves nothing when it ends."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands import scoring
from lowmem_gblm.errors import DeviceError, JobError, NonFiniteError
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning import planner
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.storage import evaluation_job, locking
from lowmem_gblm.storage.evaluation_job import EvaluationJob
from lowmem_gblm.storage.locking import OwnedFolder
from lowmem_gblm.sweeps.batches import Row
from support.crashes import Photographer, Stop
from support.tiny_models import save_tiny

# Three batches of 16 tokens of one shape, then others.
LENGTHS = (16, 15, 16, 9, 7, 7, 12, 3)
TOKENS_AT_ONCE = 32
Score = Callable[..., dict[Row, Any]]


@pytest.fixture(autouse=True)
def tell_again() -> None:
    """What is told once a process is told once a test."""
    evaluation_job._tell.cache_clear()


@pytest.fixture
def score(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """Scores rows of several lengths, as `eval --tasks` does; what it stores goes into a folder."""
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", TOKENS_AT_ONCE)
    draw = np.random.default_rng(0)
    rows = [
        Row.of(draw.integers(0, 60, length), draw.integers(0, 60, 2), first=length - 2)
        for length in LENGTHS
    ]
    # Answers to three questions, of which two have a line together.
    for _ in range(3):
        context = draw.integers(0, 60, 8)
        rows += [Row.of([*context, n, n], [n, n], first=8) for n in range(3)]

    def score(folder: Path, listener: Any = None, **options: Any) -> dict[Row, Any]:
        resources = Resources(work_dir=folder, **options)
        with scoring.model_to_score(str(llama), resources) as opened:
            return scoring.score(opened, resources, rows, listener, packed=True).scores

    return score


def stopping_at(stage: str, step: int) -> Callable[[Any], None]:
    def listener(tick: Any) -> None:
        if (tick.stage, tick.step) == (stage, step):
            raise Stop

    return listener


def blocks_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are loaded from now on."""
    loaded: list[int] = []
    load = StreamedModel.load_block

    def noting(self: StreamedModel, index: int, *given: Any, **options: Any) -> Any:
        loaded.append(index)
        return load(self, index, *given, **options)

    monkeypatch.setattr(StreamedModel, "load_block", noting)
    return loaded


@pytest.mark.parametrize("every", [1, 2])
def test_killed_before_or_after_any_durable_operation(
    every: int, score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with every second block durable, as where a GPU computes."""
    monkeypatch.setattr(planner, "durable_interval", lambda work: every)
    expected = score(tmp_path / "alone")
    photographer = Photographer(tmp_path / "run", tmp_path / "album")
    (tmp_path / "run").mkdir()
    with photographer.watching(monkeypatch):
        assert score(tmp_path / "run") == expected
    assert len(photographer.photographs) > 15
    loaded, counts = blocks_computed(monkeypatch), set()
    for photograph in photographer.photographs:
        loaded.clear()
        assert score(photograph) == expected, photograph
        assert not list(photograph.iterdir()), photograph
        counts.add(len(loaded))
    assert counts == ({0, 1, 2, 3} if every == 1 else {0, 1, 3})


@pytest.mark.parametrize(
    ("stage", "step", "left"),
    [("embed", 1, [0, 1, 2]), ("dense", 1, [1, 2]), ("dense", 3, []), ("head", 2, [])],
)
def test_a_stopped_evaluation_resumes_with_the_block_that_was_under_way(
    stage: str, step: int, left: list[int], score: Score, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = score(tmp_path / "alone")
    folder = tmp_path / "there"
    with pytest.raises(Stop) as stopped:
        score(folder, stopping_at(stage, step))
    kept = [f"What is done is kept in {one}" for one in folder.iterdir()]
    # An evaluation that has finished no step leaves nothing.
    assert getattr(stopped.value, "__notes__", []) == kept
    assert bool(kept) == (stage != "embed")
    loaded, ticks = blocks_computed(monkeypatch), []
    assert score(folder, ticks.append) == expected
    assert loaded == left
    assert [(tick.step, tick.steps) for tick in ticks if tick.stage == "dense"] == [
        (block + 1, 3) for block in left
    ]
    assert not list(folder.iterdir())


def test_seconds_of_earlier_attempts_count(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"text": str(text_file), "seqlen": 16, "windows": 3, "work_dir": tmp_path / "there"}
    with pytest.raises(Stop):
        lowmem_gblm.evaluate(llama, listener=stopping_at("dense", 3), **asked)
    (folder,) = (tmp_path / "there").iterdir()
    for entry in (folder / "journal").iterdir():
        text = entry.read_text()
        assert '"seconds": ' in text
        entry.write_text(text.replace('"seconds": ', '"seconds": 100'))
    seconds = lowmem_gblm.evaluate(llama, **asked)["seconds"]
    assert seconds["dense"] > 300
    assert seconds["total"] > 400


def test_what_differs_is_another_evaluation(
    llama: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other rows, another precision, another model in its place: none resumes what is there."""
    model, folder = save_tiny("llama", tmp_path / "model"), tmp_path / "there"
    asked: dict[str, Any] = {"text": str(text_file), "seqlen": 16, "windows": 3}
    alone = lowmem_gblm.evaluate(model, **asked)["perplexity"]

    def measured(**options: Any) -> float:
        found: float = lowmem_gblm.evaluate(model, **asked | options, work_dir=folder)["perplexity"]
        return found

    with pytest.raises(Stop):
        measured(listener=stopping_at("dense", 2))
    (kept,) = folder.iterdir()
    caplog.set_level(logging.INFO, logger="lowmem_gblm")
    for _ in range(2):
        assert measured(windows=2) == lowmem_gblm.evaluate(
            model, **asked | {"windows": 2}, work_dir=tmp_path / "elsewhere"
        )["perplexity"]  # fmt: skip
    (told,) = caplog.messages
    assert re.fullmatch(
        rf"note: {kept} \([\d.]+ KiB\) has what is done of an interrupted evaluation of {model}: "
        r"the same command resumes it; to discard it, remove that folder",
        told,
    )
    measured(dtype="bfloat16")
    save_tiny("llama", tmp_path / "other", seed=1)
    (model / "model.safetensors").rename(tmp_path / "former")
    (tmp_path / "other" / "model.safetensors").rename(model / "model.safetensors")
    assert measured() != alone
    assert [*folder.iterdir()] == [kept]
    (tmp_path / "former").rename(model / "model.safetensors")
    assert measured() == alone
    assert not list(folder.iterdir())


def test_a_resumed_evaluation_keeps_to_what_it_was_begun_with(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states are those of batches, and of which the journal has an entry was chosen."""
    expected = score(tmp_path / "alone")
    with pytest.raises(Stop):
        score(tmp_path / "there", stopping_at("dense", 2))
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 2 * TOKENS_AT_ONCE)
    monkeypatch.setattr(planner, "durable_interval", lambda work: 2)
    loaded = blocks_computed(monkeypatch)
    assert score(tmp_path / "there") == expected
    assert loaded == [2]


def test_where_host_memory_stands_in_for_the_disk_nothing_is_kept(
    score: Score, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        score(tmp_path / "there", stopping_at("dense", 2), disk=8192)
    assert not list((tmp_path / "there").iterdir())


def test_the_files_of_an_earlier_attempt_are_no_lack_of_disk_space(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk on which nothing but them would fit."""
    with pytest.raises(Stop):
        score(tmp_path / "there", stopping_at("dense", 2))
    sizes = sum(one.stat().st_size for one in (tmp_path / "there").rglob("*") if one.is_file())
    budgets = []
    plan = scoring.plan

    def noting(work: Any, budget: Any, **options: Any) -> Any:
        budgets.append(budget.disk_bytes)
        return plan(work, budget, **options)

    monkeypatch.setattr(scoring, "plan", noting)
    monkeypatch.setattr("lowmem_gblm.runtime.machine.free_disk_bytes", lambda folder: 1 << 20)
    score(tmp_path / "there")
    assert (1 << 20) + 4096 < budgets[0] <= (1 << 20) + sizes


ERRORS = {
    "device": (RuntimeError("CUDA error: an illegal memory access"), DeviceError),
    "foreign": (RuntimeError("something else"), RuntimeError),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_no_error_costs_what_is_done(
    kind: str, score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(tmp_path / "alone")
    injected, becomes = ERRORS[kind]
    forward = StreamedModel.forward_block

    def failing(self: StreamedModel, index: int, *given: Any, **options: Any) -> Any:
        if index == 2:
            raise injected
        return forward(self, index, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "forward_block", failing)
        with pytest.raises(becomes) as raised:
            score(tmp_path / "there")
    (folder,) = (tmp_path / "there").iterdir()
    said = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert f"What is done is kept in {folder}" in said
    if becomes is DeviceError:
        assert said.endswith(": the same command resumes it; to discard it, remove that folder")
    loaded = blocks_computed(monkeypatch)
    assert score(tmp_path / "there") == expected
    assert loaded == [2]


def test_numbers_that_are_not_finite_keep_what_is_done(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that has flipped on a GPU may have made them."""
    expected = score(tmp_path / "alone")
    forward = StreamedModel.forward_block

    def flipped(self: StreamedModel, index: int, *given: Any, **options: Any) -> Any:
        return forward(self, index, *given, **options) * (torch.nan if index == 1 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "forward_block", flipped)
        with pytest.raises(NonFiniteError, match="What is done is kept in "):
            score(tmp_path / "there")
    assert score(tmp_path / "there") == expected


def test_a_damaged_file_is_named(score: Score, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        score(tmp_path / "there", stopping_at("dense", 2))
    (folder,) = (tmp_path / "there").iterdir()
    stored = folder / "dense-2"
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(JobError, match=rf"{stored}.*to start over, remove {folder}$"):
        score(tmp_path / "there")


def test_evaluations_at_the_same_time_have_folders_of_their_own(tmp_path: Path) -> None:
    what = {"model": "one"}
    with closing(EvaluationJob(tmp_path, what)) as first:
        with closing(EvaluationJob(tmp_path, what)) as second:
            assert second.folder == first.folder.with_name(f"{first.folder.name}-2")
        with closing(EvaluationJob(tmp_path, {"model": "two"})) as other:
            assert other.folder.name != first.folder.name
    assert not list(tmp_path.iterdir())


def test_so_many_at_the_same_time_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_job, "_MOST", 1)
    with (
        closing(EvaluationJob(tmp_path, {})),
        pytest.raises(JobError, match=r"all of 1 folders for this evaluation are in use: .* Give"),
    ):
        EvaluationJob(tmp_path, {})


def test_a_folder_that_others_may_have_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there could be anything; in /var/tmp everyone may make folders and links."""
    with closing(EvaluationJob(tmp_path, {})) as job:
        name = job.folder.name
    (tmp_path / "theirs").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "theirs")
    with closing(EvaluationJob(tmp_path, {})) as job:
        assert job.folder.name == f"{name}-2"
        assert job.folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    found = os.getuid()
    monkeypatch.setattr(evaluation_job.os, "getuid", lambda: found + 1)
    with pytest.raises(JobError, match="are in use"):
        EvaluationJob(tmp_path, {})


def test_a_folder_that_another_process_is_removing_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark is opened, then removed, then locked."""
    lock = locking.fcntl.flock

    def late(file: Any, how: int) -> None:
        lock(file, how)
        with suppress(FileNotFoundError):
            (tmp_path / "folder" / locking.MARK).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(locking.fcntl, "flock", late)
        with pytest.raises(JobError, match="another process is using"):
            OwnedFolder(tmp_path / "folder")
    OwnedFolder(tmp_path / "folder").remove()


def test_a_person_reads_how_to_resume(
    llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ["eval", str(llama), "--text", str(text_file), "--seqlen", "16", "--windows", "3"]
    command += ["--work-dir", str(tmp_path / "there"), "-q"]
    advance = scoring.dense_sweep

    def interrupted(run: Any) -> None:
        advance(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "dense_sweep", interrupted)
        assert main(command) == 130
    (folder,) = (tmp_path / "there").iterdir()
    typed = " ".join(["lowmem-gblm", *command])
    assert capsys.readouterr().err == (
        f"lowmem-gblm: interrupted. What is done is kept in {folder}. To resume:\n{typed}\n"
    )
    assert main(command) == 0


def evaluate(model: Path, text: Path, folder: Path) -> None:
    lowmem_gblm.evaluate(model, text=str(text), seqlen=32, windows=2, work_dir=folder)


def test_what_a_killed_evaluation_left_that_cannot_be_resumed_is_removed_by_the_next_one(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    left = tmp_path / "lowmem-gblm-killed"
    OwnedFolder(left, "eval").close()
    (left / "dense-3").touch()
    evaluate(llama, text_file, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner", ["", "0123abcd /somewhere/lowmem-gblm-x.work"])
def test_the_folder_of_a_job_is_none_that_an_evaluation_left(
    owner: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    OwnedFolder(tmp_path / "lowmem-gblm-x.work", owner).close()
    evaluate(llama, text_file, tmp_path)
    assert (tmp_path / "lowmem-gblm-x.work").is_dir()


def test_what_another_evaluation_is_using_or_has_only_begun_stays(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    other = OwnedFolder(tmp_path / "lowmem-gblm-living", "eval")
    (tmp_path / "lowmem-gblm-begun").mkdir()
    (tmp_path / "lowmem-gblm-notes").touch()
    before = sorted(tmp_path.rglob("*"))
    evaluate(llama, text_file, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    other.close()


def test_what_another_user_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "lowmem-gblm-killed"
    OwnedFolder(left, "eval").close()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_job.os, "getuid", lambda: left.stat().st_uid + 1)
        evaluation_job.clear_away(tmp_path)
    assert left.is_dir()
    evaluation_job.clear_away(tmp_path)
    assert not left.exists()
