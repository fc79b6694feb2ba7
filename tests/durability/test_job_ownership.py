"""Which job is whose: shared, moved, copied and forgotten work folders; models that change."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.prune.pipeline import prune
from lowmem_gblm.commands.prune.resume import find_job
from lowmem_gblm.commands.request import PruneRequest, to_json
from lowmem_gblm.errors import BudgetError, CheckpointError, DiskError, JobError, RequestError
from lowmem_gblm.runtime.progress import Tick
from lowmem_gblm.storage import job as jobs
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.writer import CheckpointWriter
from lowmem_gblm.storage.in_place_marker import MARKER_FILE, write_marker
from lowmem_gblm.storage.job import Job
from lowmem_gblm.storage.locking import MARK, OwnedFolder
from support.crashes import content, out_of_memory, stopped_at

SIZE = {"nsamples": 2, "seqlen": 16}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def model(small: Path) -> Path:
    return small


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """To be pruned in place."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def run(model: Path, text_file: Path) -> Run:
    def run(output: Path | None, model: Path = model, **options: Any) -> dict[str, Any]:
        return lowmem_gblm.prune(
            model, output, **({"calibration": str(text_file)} | SIZE | options)
        )

    return run


@pytest.fixture
def in_place(prune_in_place: Run) -> Run:
    return prune_in_place


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_job_of_another_version_is_not_resumed(run: Run, tmp_path: Path) -> None:
    stopped_at(run, tmp_path / "out", "prune", 1)
    path = tmp_path / "out.work" / "job.json"
    found = json.loads(path.read_text())
    del found["id"]
    path.write_text(json.dumps(found))
    for go_on in (lambda: run(tmp_path / "out"), lambda: find_job(tmp_path / "out.work")):
        with pytest.raises(JobError) as caught:
            go_on()
        assert str(caught.value) == (
            f"{path} is that of another version of lowmem-gblm: finish it with that; to start "
            f"over, remove {path.parent}, unless a model was being pruned in place: its "
            f"{MARKER_FILE} says what can be done then"
        )


# One work folder, several outputs.


def test_a_finished_output_does_not_clear_the_work_folder_of_another_job(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path / "two" / "out")
    stopped_at(run, tmp_path / "one" / "out", "prune", 1, work_dir=tmp_path / "work")
    with pytest.raises(JobError, match="two/out exists already"):
        run(tmp_path / "two" / "out", work_dir=tmp_path / "work")
    run(tmp_path / "one" / "out", work_dir=tmp_path / "work")
    assert content(tmp_path / "one" / "out") == content(tmp_path / "two" / "out")


def test_a_work_folder_is_that_of_one_output(run: Run, tmp_path: Path) -> None:
    stopped_at(run, tmp_path / "one" / "out", "prune", 1, work_dir=tmp_path / "work")
    with pytest.raises(JobError) as caught:
        run(tmp_path / "two" / "out", work_dir=tmp_path / "work")
    work = tmp_path / "work" / "out.work"
    assert str(caught.value) == (
        f"{work} holds the job of {tmp_path}/one/out: give another --work-dir, or finish that job "
        f"first (lowmem-gblm resume {work})"
    )
    run(tmp_path / "one" / "out", work_dir=tmp_path / "work")


def test_what_was_written_of_an_output_is_not_thrown_away_by_another_job(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "out", "prune", 1, work_dir=tmp_path / "far away")
    with pytest.raises(JobError) as caught:
        run(tmp_path / "out")
    work = tmp_path / "far away" / "out.work"
    assert str(caught.value) == (
        f"{tmp_path}/out.partial belongs to the job in {work}: resume that job (lowmem-gblm resume "
        f"'{work}'); to start over, remove both"
    )
    assert names(tmp_path) == {"expected", "far away", "out.partial"}
    run(tmp_path / "out", work_dir=tmp_path / "far away")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_what_is_left_of_a_job_that_was_over_goes_with_the_next_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Job, "remove", lambda job: job.close())
        run(tmp_path / "out")
    assert names(tmp_path) == {"out", "out.work"}
    with pytest.raises(JobError, match="exists already"):
        run(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_job_that_changed_since_it_was_planned_is_not_gone_on_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the lock first."""
    begin = OwnedFolder.__init__

    def late(own: OwnedFolder, path: Path, owner: str = "") -> None:
        if path.name == "out.work" and not path.exists():
            with monkeypatch.context() as patch:
                patch.setattr(OwnedFolder, "__init__", begin)
                stopped_at(run, tmp_path / "out", "reverse", 1)
        begin(own, path, owner)

    with monkeypatch.context() as patch:
        patch.setattr(OwnedFolder, "__init__", late)
        with pytest.raises(JobError) as caught:
            run(tmp_path / "out")
    assert str(caught.value) == (
        f"another process has worked in {tmp_path}/out.work meanwhile: give the same command again"
    )
    run(tmp_path / "out")


# Moved and copied.


def test_a_project_may_be_moved_between_attempts(
    run: Run, model: Path, text_file: Path, tmp_path: Path
) -> None:
    run(tmp_path / "expected")
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(model, here / "model")
    shutil.copy(text_file, here / "text.txt")

    def begin(output: Path, **options: Any) -> dict[str, Any]:
        return run(output, here / "model", calibration=str(here / "text.txt"), **options)

    stopped_at(begin, here / "out", "prune", 1)
    here.rename(there)
    with pytest.raises(JobError) as caught:
        find_job(there / "out.work")
    assert str(caught.value) == (
        f"the model {here}/model of the job in {there}/out.work is not there any more: give the "
        f"prune command with its new place"
    )
    run(there / "out", there / "model", calibration=str(there / "text.txt"))
    assert content(there / "out") == content(tmp_path / "expected")
    assert names(there) == {"model", "out", "text.txt"}


def test_an_output_that_was_moved_with_its_work_folder_is_gone_on_with_there(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "here" / "out", "prune", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert main(["resume", str(tmp_path / "there" / "out.work")]) == 0
    assert content(tmp_path / "there" / "out") == content(tmp_path / "expected")
    assert names(tmp_path) == {"expected", "there"}


def test_a_project_may_be_moved_twice_and_a_copy_of_it_gone_on_with(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "1" / "out", "dense", 1)
    for number, (stage, step) in enumerate([("reverse", 1), ("prune", 1)], start=2):
        (tmp_path / f"{number - 1}").rename(tmp_path / f"{number}")

        def again(work: Path, **options: Any) -> None:
            prune(find_job(work), **options)

        stopped_at(again, tmp_path / f"{number}" / "out.work", stage, step)
    shutil.copytree(tmp_path / "3", tmp_path / "copy")
    for name in ("copy", "3"):
        prune(find_job(tmp_path / name / "out.work"))
        assert content(tmp_path / name / "out") == content(tmp_path / "expected")
        assert names(tmp_path / name) == {"out"}
    assert names(tmp_path) == {"3", "copy", "expected"}


def test_an_output_that_lies_elsewhere_by_now_and_is_linked_to_is_the_same(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "small" / "out", "prune", 1, work_dir=tmp_path / "work")
    (tmp_path / "small").rename(tmp_path / "large")
    (tmp_path / "small").symlink_to(tmp_path / "large")
    run(tmp_path / "small" / "out", work_dir=tmp_path / "work")
    assert content(tmp_path / "large" / "out") == content(tmp_path / "expected")


def test_what_is_left_of_an_output_whose_job_is_gone_is_written_anew(
    run: Run, tmp_path: Path
) -> None:
    """In the folder of its job another one was begun meanwhile."""
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "one" / "out", "prune", 1, work_dir=tmp_path / "work")
    shutil.rmtree(tmp_path / "work")
    stopped_at(run, tmp_path / "two" / "out", "prune", 1, work_dir=tmp_path / "work")
    run(tmp_path / "one" / "out")
    run(tmp_path / "two" / "out", work_dir=tmp_path / "work")
    for name in ("one", "two"):
        assert content(tmp_path / name / "out") == content(tmp_path / "expected")


def test_a_model_that_is_half_pruned_may_be_moved_with_its_work_folder(
    in_place: Run, copy: Path, tmp_path: Path
) -> None:
    in_place(Path(shutil.copytree(copy, tmp_path / "expected" / "copy")))
    stopped_at(in_place, copy, "prune", 1)
    there = tmp_path / "there"
    there.mkdir()
    copy.rename(there / "copy")
    with pytest.raises(JobError) as caught:
        find_job(Path(f"{copy}.work"))
    assert str(caught.value) == (
        f"the model {copy} of the job in {copy}.work is not there any more: move it back"
    )
    Path(f"{copy}.work").rename(there / "copy.work")
    assert main(["resume", str(there / "copy.work")]) == 0
    assert content(there / "copy") == content(tmp_path / "expected" / "copy")
    assert names(there) == {"copy"}


# Models that change in the meantime.


@pytest.mark.parametrize("without_notice", [False, True])
def test_a_model_that_was_put_back_is_not_taken_for_the_half_pruned_one(
    without_notice: bool, in_place: Run, model: Path, copy: Path
) -> None:
    stopped_at(in_place, copy, "prune", 2)
    shutil.copy(model / "model.safetensors", copy)
    if without_notice:
        (copy / MARKER_FILE).unlink()
    with pytest.raises(JobError) as caught:
        in_place(copy)
    assert str(caught.value).startswith(
        f"{copy} is not the model that was being pruned: block 0 does not hold what was written "
        f"over it. If the model was put back or fetched again, remove {copy}/{MARKER_FILE} and "
        f"{copy}.work to start over"
    )
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    (copy / MARKER_FILE).unlink(missing_ok=True)
    shutil.rmtree(f"{copy}.work")
    in_place(copy)
    lowmem_gblm.verify(copy, model)


@pytest.mark.parametrize(("stage", "step"), [("reverse", 2), ("prune", 1)])
def test_a_model_with_other_matrices_is_not_taken_for_the_one_begun(
    stage: str, step: int, in_place: Run, copy: Path
) -> None:
    """Its norms and embeddings are the same, as where only low-rank updates were merged."""
    stopped_at(in_place, copy, stage, step)
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1" in name and tensor.ndim == 2:
            tensor += 0.1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(JobError, match=r"was begun otherwise \(source_blocks: other in 1\)"):
        in_place(copy)


def lock(folder: Path, how: int) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, how)
    return descriptor


def test_a_model_that_is_read_is_not_overwritten_and_the_other_way_round(
    run: Run, in_place: Run, copy: Path, text_file: Path, tmp_path: Path
) -> None:
    reading = lock(copy, fcntl.LOCK_SH)
    with pytest.raises(JobError) as caught:
        in_place(copy)
    assert str(caught.value) == f"another process is using {copy}: wait for it, or end it"
    assert not (copy / MARKER_FILE).exists()
    run(tmp_path / "out", copy)
    os.close(reading)
    overwriting = lock(copy, fcntl.LOCK_EX)
    for read in (
        lambda: run(tmp_path / "again", copy),
        lambda: lowmem_gblm.evaluate(copy, text=str(text_file), seqlen=16, windows=1),
    ):
        with pytest.raises(JobError) as caught:
            read()
        assert str(caught.value) == f"another process is overwriting {copy}: wait for it, or end it"
    os.close(overwriting)
    in_place(copy)


def test_where_there_are_no_locks_nobody_is_held_off(
    run: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def without(file: Any, how: int) -> None:
        if isinstance(file, int):
            raise OSError("no locks here")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", without)
    run(tmp_path / "out", copy)


def test_a_model_that_begins_to_be_pruned_in_place_while_it_is_opened_is_refused(
    run: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Checkpoint.__init__

    def slowly(checkpoint: Checkpoint, folder: Path) -> None:
        opened(checkpoint, folder)
        write_marker(copy, tmp_path / "copy.work", "another", overwritten=True)

    monkeypatch.setattr(Checkpoint, "__init__", slowly)
    with pytest.raises(JobError, match="is being pruned in place, or was until"):
        run(tmp_path / "out", copy)
    assert not (tmp_path / "out.work").exists()


# What is kept.


def test_a_source_that_is_sick_for_a_moment_does_not_cost_the_job(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "expected")

    def gone(output: CheckpointWriter, check: Callable[[], None]) -> None:
        raise CheckpointError("a shard is shorter than it was")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_rest", gone)
        with pytest.raises(CheckpointError, match="shorter than it was"):
            run(tmp_path / "out")
    assert run(tmp_path / "out")["attempts"] == 2
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_what_has_gone_in_the_middle_of_a_run_is_named_with_the_way_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(output: CheckpointWriter, check: Callable[[], None]) -> None:
        raise PermissionError(13, "Permission denied", "/far/shard.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_rest", denied)
        with pytest.raises(DiskError) as caught:
            run(tmp_path / "out")
    assert str(caught.value) == (
        f"the file shard.safetensors could not be written to or read from /far/shard.safetensors "
        f"(Permission denied): mend that, then give the same command again, or lowmem-gblm resume "
        f"{tmp_path}/out.work, which resumes from what is done"
    )
    run(tmp_path / "out")


def test_a_job_in_place_that_came_to_nothing_twice_can_be_begun_again(
    in_place: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the marker was put up; then while the next attempt begins."""

    class Killed(BaseException):
        pass

    def killed(*args: object, **options: object) -> None:
        raise Killed

    in_place(Path(shutil.copytree(copy, tmp_path / "expected" / "copy")))
    for name in (
        "lowmem_gblm.commands.prune.session._assemble",
        "lowmem_gblm.storage.job.publish_json",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, killed)
            # A process that is killed clears nothing away.
            patch.setattr(
                "lowmem_gblm.commands.prune.session._put_away",
                lambda setup, job, output, keep: job.close(),
            )
            with pytest.raises(Killed):
                in_place(copy)
        assert (copy / MARKER_FILE).exists()
    in_place(copy)
    assert content(copy) == content(tmp_path / "expected" / "copy")
    assert names(tmp_path) == {"copy", "expected"}


def test_a_notice_goes_before_the_job_it_speaks_of(
    in_place: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    forget = Job.forget

    def watching(job: Job) -> None:
        seen.append((copy / MARKER_FILE).exists())
        forget(job)

    monkeypatch.setattr(Job, "forget", watching)
    stopped_at(in_place, copy, "embed", 1)
    assert seen == [False]


def test_a_parent_that_may_not_be_written_to_asks_for_a_work_folder(
    in_place: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lowmem_gblm.storage.locking._make", denied)
    with pytest.raises(RequestError) as caught:
        in_place(copy)
    assert str(caught.value) == (
        f"{copy}.work cannot be made (Permission denied): give another place with --work-dir"
    )


def test_memory_that_runs_short_stops_a_run_outside_of_the_main_thread(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[Tick] = []

    def listener(tick: Tick) -> None:
        ticks.append(tick)
        out_of_memory(monkeypatch)

    with ThreadPoolExecutor(1) as elsewhere:
        running = elsewhere.submit(run, tmp_path / "out", listener=listener, cpu_memory=8 << 30)
        with pytest.raises(BudgetError, match="stopped before the system"):
            running.result()
    assert len(ticks) == 1


def test_new_folders_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("lowmem_gblm.storage.locking.flush_folder", flushed.append)
    monkeypatch.setattr(jobs, "flush_folder", flushed.append)
    request = PruneRequest(model="demo", output=tmp_path / "out")
    described = {"identity": {"in_place": False}, "request": to_json(request)}
    places = {"folder": "", "output": ""}
    Job(tmp_path / "far" / "work", described | places, None).remove()
    assert flushed == [tmp_path / "far", tmp_path, tmp_path / "far" / "work"]
    assert not (tmp_path / "far" / "work" / MARK).exists()
