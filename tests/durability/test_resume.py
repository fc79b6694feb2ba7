"""A job that is killed at any instant is resumed, and gives the same bytes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.prune.resume import find_job
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import BudgetError, CheckpointError, JobError, NonFiniteError
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning import planner
from lowmem_gblm.planning.sizes import Choices
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.header import read_header
from support.crashes import KILL_MATRIX, Killer, Photographer, content, stopped_at
from support.tiny_models import save_tiny

SIZE = {"nsamples": 2, "seqlen": 16}
KILLS = 12


@pytest.fixture
def model(small: Path) -> Path:
    return small


@pytest.fixture
def run(model: Path, text_file: Path):
    def run(output: Path, **options: object) -> dict:
        return lowmem_gblm.prune(model, output, calibration=str(text_file), **SIZE, **options)

    return run


@pytest.mark.parametrize(("method", "activations", "every"), KILL_MATRIX)
def test_killed_before_or_after_any_durable_operation(
    method: str,
    activations: str,
    every: int,
    run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"method": method, "activations": activations}
    run(tmp_path / "expected", **options)
    expected = content(tmp_path / "expected")
    (tmp_path / "run").mkdir()
    photographer = Photographer(tmp_path / "run", tmp_path / "album")
    with photographer.watching(monkeypatch):
        run(tmp_path / "run" / "out", **options)
    assert content(tmp_path / "run" / "out") == expected
    assert photographer.operations > 20
    check_resumed(photographer.photographs[::every], partial(run, **options), expected)


def check_resumed(photographs, run, expected: dict[str, str]) -> None:
    """Each gives the expected files, whether it is resumed or was complete."""
    for photograph in photographs:
        output = photograph / "out"
        if not output.exists():
            run(output)
        else:
            with pytest.raises(lowmem_gblm.LowmemGblmError, match="exists already"):
                run(output)
        assert content(output) == expected, photograph
        assert [path.name for path in photograph.iterdir()] == ["out"], photograph


@pytest.mark.parametrize(
    ("method", "activations", "every"),
    [
        ("gblm", "pruned", 6),
        ("wanda", "pruned", 6),
        pytest.param("gblm", "pruned", 1, marks=pytest.mark.slow),
        pytest.param("gblm", "dense", 1, marks=pytest.mark.slow),
        pytest.param("wanda", "pruned", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_between_two_durable_steps(
    method: str,
    activations: str,
    every: int,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a GPU computes: hidden states stay in host memory, every second block is durable.

    And every second boundary is kept, as where the disk is small.
    """
    model = save_tiny("llama", tmp_path / "model", blocks=4, width=16)
    options = {"method": method, "activations": activations, "calibration": str(text_file)}
    # Two blocks, and what no block holds.
    options["max_shard_size"] = 25000

    def run(output: Path) -> dict:
        return lowmem_gblm.prune(model, output, **SIZE, **options)

    monkeypatch.setattr(planner, "durable_interval", lambda work: 1)
    run(tmp_path / "expected")
    expected = content(tmp_path / "expected")
    monkeypatch.setattr(planner, "durable_interval", lambda work: 2)
    monkeypatch.setattr(
        planner, "_on_disk", lambda work, choices: [replace(choices, boundary_interval=2)]
    )
    (tmp_path / "run").mkdir()
    photographer = Photographer(tmp_path / "run", tmp_path / "album")
    with photographer.watching(monkeypatch):
        record = run(tmp_path / "run" / "out")
    assert record["choices"]["durable_interval"] == record["choices"]["boundary_interval"] == 2
    assert content(tmp_path / "run" / "out") == expected
    check_resumed(photographer.photographs[::every], run, expected)


@pytest.mark.parametrize(
    ("activations", "interval", "every"),
    [
        ("pruned", 2, 30),
        pytest.param("pruned", 1, 1, marks=pytest.mark.slow),
        pytest.param("dense", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_while_an_option_is_chosen(
    activations: str,
    interval: int,
    every: int,
    run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same candidate is chosen, by the same losses."""
    options = {"alpha": "auto", "activations": activations}
    search = run(tmp_path / "expected", **options)["search"]
    expected = content(tmp_path / "expected")
    monkeypatch.setattr(planner, "durable_interval", lambda work: interval)
    (tmp_path / "run").mkdir()
    photographer = Photographer(tmp_path / "run", tmp_path / "album")
    with photographer.watching(monkeypatch):
        run(tmp_path / "run" / "out", **options)
    assert content(tmp_path / "run" / "out") == expected
    photographs = photographer.photographs[::every]
    check_resumed(photographs, partial(run, **options), expected)
    records = [json.loads((one / "out" / RECORD).read_text()) for one in photographs]
    assert all(record["search"] == search for record in records)


@pytest.mark.parametrize(
    ("stage", "step", "order"),
    [
        ("embed", 2, "0 1 1 0 0 1"),
        ("dense", 1, "1 1 0 0 1"),
        ("head", 2, "1 0 0 1"),
        ("reverse", 1, "0 0 1"),
        ("prune", 1, "1"),
        ("prune", 2, ""),
    ],
)
def test_only_what_is_left_is_done(
    stage: str, step: int, order: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "out", stage, step)
    loaded: list[str] = []
    load = StreamedModel.load_block

    def watching(streamed: StreamedModel, index: int, tensors: dict, **options: object) -> None:
        loaded.append(str(index))
        load(streamed, index, tensors, **options)

    monkeypatch.setattr(StreamedModel, "load_block", watching)
    record = run(tmp_path / "out")
    # The step of a listener that stops everything is not yet written down in embed and head.
    assert " ".join(loaded) == order
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert record["attempts"] == (1 if stage == "embed" else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_the_record_of_a_resumed_run_is_whole(run, tmp_path: Path) -> None:
    plain = run(tmp_path / "expected")
    stopped_at(run, tmp_path / "out", "prune", 1)
    resumed = run(tmp_path / "out")
    for name in ("tensors", "shards", "calibration_loss", "sparsity_measured", "fingerprints"):
        assert resumed[name] == plain[name], name
    assert resumed["seconds"].keys() == plain["seconds"].keys()
    assert lowmem_gblm.verify(tmp_path / "out")["pruned_tensors"] == 14


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("sparsity", 0.7, "sparsity: 0.5, now 0.7"),
        ("method", "wanda", "method: 'gblm', now 'wanda'"),
        ("nsamples", 1, "nsamples: 2, now 1"),
        ("seed", 4, "seed: 0, now 4"),
    ],
)
def test_another_job_in_the_same_place_is_refused(
    option: str, value: object, sentence: str, model: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {"calibration": str(text_file), **SIZE}

    def run(output: Path, **more: object) -> dict:
        return lowmem_gblm.prune(model, output, **options | more)

    stopped_at(run, tmp_path / "out", "dense", 1)
    with pytest.raises(JobError) as caught:
        run(tmp_path / "out", **{option: value})
    assert sentence in str(caught.value)
    assert f"lowmem-gblm resume {tmp_path}/out.work" in str(caught.value)
    assert f"to start over, remove {tmp_path}/out.work" in str(caught.value)
    run(tmp_path / "out")


def test_a_job_is_the_same_from_wherever_it_is_asked_for(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "text.txt")
    (tmp_path / "elsewhere").mkdir()

    def run(output: Path, folder: Path = Path(), **more: object) -> dict:
        text = str(folder / "text.txt")
        return lowmem_gblm.prune(folder / "model", output, calibration=text, **SIZE, **more)

    monkeypatch.chdir(tmp_path)
    run(Path("expected"))
    for place, ask in (
        (".", lambda: main(["resume", "out.work"])),
        (".", lambda: main(["resume", "./out.work/"])),
        ("elsewhere", lambda: main(["resume", "../out.work"])),
        ("elsewhere", lambda: main(["resume", str(tmp_path / "out.work")])),
        ("elsewhere", lambda: run(tmp_path / "out", tmp_path)),
        ("elsewhere", lambda: run(Path("../out"), Path(".."))),
    ):
        monkeypatch.chdir(tmp_path)
        stopped_at(run, Path("out"), "dense", 1)
        monkeypatch.chdir(place)
        ask()
        assert content(tmp_path / "out") == content(tmp_path / "expected")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["c4", "wikitext2", "demo"])
def test_a_file_of_its_name_does_not_stand_for_a_data_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert PruneRequest(model="m", calibration=name).calibration_text == name
    (tmp_path / "text").touch()
    request = PruneRequest(model="m", calibration="text")
    assert request.calibration_text == str(tmp_path / "text")


def test_another_text_is_another_job(model: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())

    def run(output: Path, **more: object) -> dict:
        return lowmem_gblm.prune(model, output, calibration=str(text), **SIZE, **more)

    stopped_at(run, tmp_path / "out", "dense", 1)
    text.write_text(text_file.read_text()[::-1])
    with pytest.raises(JobError, match="calibration_tokens: "):
        run(tmp_path / "out")


def test_another_model_of_the_same_shapes_is_another_job(
    run, model: Path, text_file: Path, tmp_path: Path
) -> None:
    stopped_at(run, tmp_path / "out", "dense", 1)
    other = save_tiny("llama", tmp_path / "other", blocks=2, width=16, seed=1)
    with pytest.raises(JobError, match="source_bytes: "):
        lowmem_gblm.prune(other, tmp_path / "out", calibration=str(text_file), **SIZE)


def test_budgets_may_change_between_attempts(run, tmp_path: Path) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "out", "reverse", 1)
    run(tmp_path / "out", cpu_memory=4 << 30, disk=1 << 30)
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_with_less_disk_a_begun_job_waits_for_room_and_loses_nothing(run, tmp_path: Path) -> None:
    run(tmp_path / "expected")
    stopped_at(run, tmp_path / "out", "dense", 1)
    # Host memory could stand in for the disk in a new job, not in one that has files already.
    with pytest.raises(BudgetError, match="of disk space"):
        run(tmp_path / "out", disk=1000)
    run(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_a_reader_that_waits_for_memory_gives_up_when_the_run_does(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(streamed: StreamedModel, index: int, tensors: dict, **options: object) -> None:
        raise CheckpointError("no such block")

    monkeypatch.setattr(
        "lowmem_gblm.planning.planner._in_memory", lambda *args: iter([Choices(read_ahead=False)])
    )
    monkeypatch.setattr(StreamedModel, "load_block", fail)
    with pytest.raises(CheckpointError, match="no such block"):
        run(tmp_path / "out")


def test_another_device_has_to_be_accepted(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(run, tmp_path / "out", "reverse", 1)
    with monkeypatch.context() as patch:
        for module in ("identity", "session"):
            name = f"lowmem_gblm.commands.prune.{module}.device_name"
            patch.setattr(name, lambda device: "NVIDIA Something")
        with pytest.raises(JobError, match=r"device: 'cpu', now 'NVIDIA.*--accept-other-rounding"):
            run(tmp_path / "out")
        stopped_at(run, tmp_path / "out", "prune", 1, accept_other_rounding=True)
    # The step that was interrupted is done by the CPU again; what the GPU has done is told.
    record = run(tmp_path / "out")
    assert (
        "begun on cpu and continued on NVIDIA Something: the rounding of all is in it"
        in record["notes"]
    )


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
@pytest.mark.parametrize("place", ["out.work/loss-gradient-1", "out.partial/model.safetensors*"])
def test_a_damaged_job_is_told(damage, place: str, run, tmp_path: Path) -> None:
    stopped_at(run, tmp_path / "out", *(("prune", 1) if "partial" in place else ("reverse", 1)))
    (path,) = tmp_path.glob(place)
    damage(path)
    with pytest.raises(
        JobError, match=r"missing or damaged: look at the disk; to start over, remove "
    ):
        run(tmp_path / "out")


@pytest.mark.parametrize("method", ["wanda", "gradient"])
def test_a_block_that_was_changed_in_its_shard_is_told(method: str, run, tmp_path: Path) -> None:
    """First block to last with `wanda`, last to first with `gradient`."""
    stage = "prune" if method == "wanda" else "reverse"
    stopped_at(run, tmp_path / "out", stage, 1, method=method)
    (path,) = tmp_path.glob("out.partial/model.safetensors.tmp")
    before = path.read_bytes()
    entries = read_header(path)
    done = 0 if method == "wanda" else 1
    for name, entry in entries.items():
        if f"layers.{done}." not in name:
            # Not written, or cut short: it will be written.
            assert before[entry.offset :][: entry.nbytes] == bytes(entry.nbytes)
            with path.open("r+b") as file:
                file.seek(entry.offset)
                file.write(b"?" * entry.nbytes)
    scribbled = path.read_bytes()
    place = max(entry.offset for name, entry in entries.items() if f"layers.{done}." in name)
    path.write_bytes(scribbled[:place] + bytes([scribbled[place] ^ 1]) + scribbled[place + 1 :])
    with pytest.raises(JobError, match="does not hold what an interrupted run has written"):
        run(tmp_path / "out", method=method)
    path.write_bytes(scribbled)
    run(tmp_path / "out", method=method)
    run(tmp_path / "expected", method=method)
    assert content(tmp_path / "out") == content(tmp_path / "expected")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_journal_that_lacks_an_entry_is_told(damage, run, tmp_path: Path) -> None:
    stopped_at(run, tmp_path / "out", "reverse", 1)
    path = tmp_path / "out.work" / "journal" / "000001.json"
    damage(path)
    with pytest.raises(JobError) as caught:
        run(tmp_path / "out")
    assert str(caught.value).startswith(f"{path} is ")
    assert str(caught.value).endswith(
        f". Look at the disk; to start over, remove {tmp_path}/out.work"
    )


def test_a_damaged_description_is_told(run, tmp_path: Path) -> None:
    stopped_at(run, tmp_path / "out", "reverse", 1)
    path = tmp_path / "out.work" / "job.json"
    path.write_bytes(b"{")
    for go_on in (lambda: run(tmp_path / "out"), lambda: find_job(tmp_path / "out.work")):
        with pytest.raises(JobError) as caught:
            go_on()
        assert str(caught.value).startswith(f"{path} is not JSON: ")
        assert str(caught.value).endswith(
            f". Look at the disk; to start over, remove {tmp_path}/out.work, unless a model was "
            f"being pruned in place: its PRUNING-IN-PLACE says what can be done then"
        )


def test_an_error_before_the_first_step_leaves_nothing_and_one_after_it_keeps_the_job(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def non_finite(*args: object, **options: object):
        raise NonFiniteError("non-finite")

    monkeypatch.setattr("lowmem_gblm.sweeps.block_pruner.BlockPruner.prune", non_finite)
    with pytest.raises(NonFiniteError, match=r"^non-finite$"):
        run(tmp_path / "out", method="magnitude")
    assert not list(tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match=r"^non-finite\. What is done is kept in "):
        run(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.work"}


def test_killed_at_random_times(run, tmp_path: Path) -> None:
    options = {"method": "gblm", "sparsity": 0.6}
    start = time.monotonic()
    run(tmp_path / "expected", **options)
    seconds = time.monotonic() - start
    expected = content(tmp_path / "expected")
    killer, finished = Killer(seconds), 0
    output = tmp_path / "out"
    while killer.kills < KILLS or not finished:
        killer.kills_one(lambda: run(output, **options))
        if output.exists():
            finished += 1
            shutil.rmtree(tmp_path / "out.work", ignore_errors=True)
            assert content(output).keys() - {".lowmem-gblm"} == expected.keys()
            assert all(content(output)[name] == expected[name] for name in expected)
            shutil.rmtree(output)
