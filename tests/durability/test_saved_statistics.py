"""Statistics that are saved for later runs are complete or absent, whatever ends the run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import DiskFull, JobError
from lowmem_gblm.storage import atomic, statistics_folder
from lowmem_gblm.storage.disk_errors import blamed
from support.crashes import Photographer, content, stopped_at

SIZE = {"nsamples": 2, "seqlen": 16}
EVERY = 7


@pytest.fixture
def run(small: Path, text_file: Path) -> Callable[..., dict[str, Any]]:
    """Saves its statistics beside its output."""

    def run(output: Path, **options: object) -> dict[str, Any]:
        saved = output.with_name("statistics")
        asked = {"calibration": str(text_file), "save_statistics": saved, **SIZE}
        return lowmem_gblm.prune(small, output, **asked | options)

    return run


@pytest.mark.parametrize("activations", ["pruned", "dense"])
def test_killed_before_or_after_any_durable_operation(
    activations: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    photographer = Photographer(tmp_path / "run", tmp_path / "album")
    with photographer.watching(monkeypatch):
        run(tmp_path / "run" / "out", activations=activations)
    expected = [content(tmp_path / "run" / name) for name in ("out", "statistics")]
    # The last ones are those of the folders that get their names.
    last = photographer.photographs[-8:]
    published = 0
    for photograph in [*photographer.photographs[:-8:EVERY], *last]:
        output, saved = photograph / "out", photograph / "statistics"
        if saved.exists():
            published += 1
            assert content(saved).keys() - {".lowmem-gblm"} == expected[1].keys()
        if output.exists():
            with pytest.raises(JobError, match="out exists already: choose another OUTPUT"):
                run(output, activations=activations)
        else:
            run(output, activations=activations)
        assert [content(output), content(saved)] == expected, photograph
        assert {path.name for path in photograph.iterdir()} == {"out", "statistics"}, photograph
    assert published > 2


def test_published_statistics_are_those_of_the_job_that_is_resumed(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.work", "statistics"}
    found = content(tmp_path / "statistics")
    shutil.move(tmp_path / "statistics", tmp_path / "elsewhere")
    (tmp_path / "statistics").mkdir()
    with pytest.raises(JobError, match="exists already: choose another --save-statistics"):
        run(tmp_path / "out")
    (tmp_path / "statistics").rmdir()
    with pytest.raises(JobError, match="was written by an interrupted run and is missing"):
        run(tmp_path / "out")
    shutil.rmtree(tmp_path / "statistics.partial", ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", tmp_path / "statistics")
    run(tmp_path / "out")
    assert content(tmp_path / "statistics") == found
    assert {path.name for path in tmp_path.iterdir()} == {"out", "statistics"}


def test_a_job_that_was_moved_takes_its_statistics_along(run, tmp_path: Path) -> None:
    run(tmp_path / "expected" / "out")
    stopped_at(run, tmp_path / "here" / "out", "prune", 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert main(["resume", str(tmp_path / "there" / "out.work")]) == 0
    names = {"out", "statistics"}
    assert {path.name for path in (tmp_path / "there").iterdir()} == names
    for name in names:
        assert content(tmp_path / "there" / name) == content(tmp_path / "expected" / name)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"save_statistics": None}, "save_statistics: 'statistics', now None"),
        ({"statistics_dtype": "int8"}, "statistics_dtype: 'float32', now 'int8'"),
    ],
)
def test_a_job_that_saves_otherwise_is_another_job(
    options: dict[str, Any], sentence: str, run, tmp_path: Path
) -> None:
    stopped_at(run, tmp_path / "out", "reverse", 1)
    with pytest.raises(JobError, match=sentence):
        run(tmp_path / "out", **options)


def test_a_job_goes_on_with_the_statistics_that_it_was_begun_with(
    run, small: Path, tmp_path: Path
) -> None:
    dense = {"activations": "dense"}
    run(tmp_path / "saving", **dense)
    saved = tmp_path / "statistics"

    def taking(output: Path, **options: Any) -> dict[str, Any]:
        return lowmem_gblm.prune(small, output, statistics=saved, **dense, **options)

    taking(tmp_path / "expected")
    stopped_at(taking, tmp_path / "out", "prune", 1)
    assert main(["resume", str(tmp_path / "out.work")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    stopped_at(taking, tmp_path / "again", "prune", 1)
    shutil.rmtree(saved)
    run(tmp_path / "other", seed=1, **dense)
    with pytest.raises(JobError, match="statistics_taken: "):
        taking(tmp_path / "again")


def test_a_run_that_ends_before_its_first_step_leaves_nothing(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_gblm.model.streamed_model.StreamedModel.embed", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_the_job_is_resumed(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "expected" / "out")
    publish = statistics_folder.publish_shard

    def full(path: Path, *args: Any) -> dict[str, Any]:
        if path.name == "block-00001.safetensors":
            with blamed(path, args[-1]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return publish(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(statistics_folder, "publish_shard", full)
        told = "the disk is full: the statistics of block 1 could not be written to .*make room"
        with pytest.raises(DiskFull, match=told):
            run(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {
        "expected", "out.partial", "out.work", "statistics.partial",
    }  # fmt: skip
    run(tmp_path / "out")
    for name in ("out", "statistics"):
        assert content(tmp_path / name) == content(tmp_path / "expected" / name)


def test_two_jobs_do_not_share_a_folder(run, tmp_path: Path) -> None:
    stopped_at(run, tmp_path / "one", "prune", 1)
    with pytest.raises(JobError, match=r"statistics\.partial belongs to the job in .*one\.work"):
        run(tmp_path / "two")
    run(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "statistics"}
