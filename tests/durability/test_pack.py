"""A packed and an unpacked folder are complete or absent, whatever ends the command."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands import pack as module
from lowmem_gblm.errors import INTERRUPTED, DiskError, DiskFull, JobError
from lowmem_gblm.storage import atomic
from lowmem_gblm.storage.disk_errors import blamed
from support.crashes import Photographer, content, ctrl_c, stopped_at

Command = Callable[[Path, Path], dict[str, Any]]


@pytest.fixture(scope="module")
def folders(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command reads. Not to be modified."""
    place = tmp_path_factory.mktemp("folders")
    lowmem_gblm.prune(small, place / "out", method="magnitude", max_shard_size=1)
    lowmem_gblm.pack(place / "out", place / "packed")
    return {"pack": place / "out", "unpack": place / "packed"}


@pytest.fixture(params=["pack", "unpack"])
def run(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Callable[[Path], Any]:
    """Reads one of the folders and writes another."""
    command = getattr(lowmem_gblm, request.param)
    return lambda made: command(folders[request.param], made)


def test_killed_before_or_after_any_durable_operation(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    photographer = Photographer(tmp_path / "run", tmp_path / "album")
    with photographer.watching(monkeypatch):
        run(tmp_path / "run" / "made")
    expected = content(tmp_path / "run" / "made")
    published = 0
    for photograph in photographer.photographs:
        made = photograph / "made"
        if made.exists():
            published += 1
            assert content(made).keys() - {".lowmem-gblm"} == expected.keys()
        else:
            run(made)
            assert content(made) == expected
            assert {path.name for path in photograph.iterdir()} == {"made"}
    assert published > 0
    assert len(photographer.photographs) >= 20


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, DiskFull, "the disk is full: .* make room, then give the same command"),
        (errno.EIO, DiskError, "a disk is failing .* look after that disk, then give the same"),
    ],
)
def test_a_disk_that_fails_leaves_nothing(
    number: int, kind: type[Exception], told: str, run, tmp_path: Path, monkeypatch
) -> None:
    publish = atomic.PendingFile.publish

    def failing(file: atomic.PendingFile) -> None:
        if file._path.name.startswith("model-00002"):
            with blamed(file._path, "the shard"):
                raise OSError(number, os.strerror(number))
        publish(file)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.PendingFile, "publish", failing)
        with pytest.raises(kind, match=told):
            run(tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    for command, what in (("pack", "pack_shard"), ("unpack", "unpacked_pieces")):
        with monkeypatch.context() as patch:
            patch.setattr(module, what, ctrl_c)
            assert main([command, str(folders[command]), str(tmp_path / "made")]) == INTERRUPTED
        told = capsys.readouterr().err
        assert "interrupted. Nothing half-done is left. To begin again:\nlowmem-gblm" in told
        assert not list(tmp_path.iterdir())


def test_an_unfinished_run_of_prune_is_left_alone(
    run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    def prune(made: Path, **options: Any) -> dict[str, Any]:
        asked = {"method": "wanda", "nsamples": 2, "seqlen": 16, "calibration": str(text_file)}
        return lowmem_gblm.prune(small, made, **asked | options)

    stopped_at(prune, tmp_path / "made", "prune", 1)
    before = content(tmp_path / "made.partial")
    with pytest.raises(JobError, match=r"made\.partial belongs to an unfinished run of prune"):
        run(tmp_path / "made")
    assert content(tmp_path / "made.partial") == before
    prune(tmp_path / "made")


def test_a_folder_of_others_is_left_alone(run, tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "mine").touch()
    with pytest.raises(JobError, match="exists and was not made by lowmem-gblm: move it away"):
        run(tmp_path / "made")
    assert (tmp_path / "made.partial" / "mine").exists()
