"""Where things are: places that cannot work are refused before anything is made or lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.paths import check_apart, paths_of
from lowmem_gblm.commands.request import PruneRequest, request_from_json, to_json
from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.storage.atomic import publish_folder
from lowmem_gblm.storage.checkpoint.file_access import side_files
from lowmem_gblm.storage.hub import locate
from lowmem_gblm.storage.locking import MARK

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("output", [".", "..", "", "./", "nowhere/.."])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_folder_that_is_called_by_no_name_exists_already(
    pruned: bool,
    output: str,
    llama: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if pruned:
        for folder in (here, here.parent):
            (folder / "pruning.json").touch()
    assert main(["prune", str(llama), output]) == 5
    assert "exists already: choose another OUTPUT" in capsys.readouterr().err
    assert paths_of(PruneRequest(model="m", output=Path(output))).output.name


def test_a_plan_for_the_current_folder_has_a_work_folder_beside_it(here: Path) -> None:
    request = PruneRequest(model="m", output=Path("."))
    assert paths_of(request).work_folder == here.with_name("here.work")


@pytest.mark.parametrize("name", ["model", "output", "work_dir", "calibration", "include"])
def test_a_name_that_is_not_utf8_is_refused(name: str) -> None:
    kinds: dict[str, Callable[[str], Any]] = {
        "output": Path,
        "work_dir": Path,
        "include": lambda text: (text,),
    }
    values = {"model": "model", name: kinds.get(name, str)(NOT_UTF8)}
    with pytest.raises(RequestError, match=f"the {name} is not UTF-8: .*caf.udce9"):
        PruneRequest(**values)


def test_an_output_in_a_folder_whose_name_is_not_utf8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NOT_UTF8).mkdir()
    monkeypatch.chdir(tmp_path / NOT_UTF8)
    with pytest.raises(RequestError, match="the output is not UTF-8"):
        PruneRequest(model="model", output=Path("out"))
    PruneRequest(model="model", output=tmp_path / "out")


@pytest.mark.parametrize(
    "edit",
    [lambda asked: asked.pop("seed"), lambda asked: asked.update(seed_of_tomorrow=1)],
    ids=["lacks an option", "has another option"],
)
def test_a_job_of_another_version_is_refused(edit: Callable[[dict[str, Any]], object]) -> None:
    asked = to_json(PruneRequest(model="model"))
    edit(asked)
    message = r"was begun by another version of lowmem-gblm, .* \(seed.*\): resume it with that"
    with pytest.raises(JobError, match=message):
        request_from_json(asked)


def test_a_request_comes_back_as_it_was_made(here: Path) -> None:
    asked = PruneRequest(
        model="owner/model", output=here / "out", sparsity=0.3, include=("a*", "b*"), seed=3
    )
    again = request_from_json(json.loads(json.dumps(to_json(asked))))
    assert replace(again, calibration=None, sparsity=0.3) == asked


def test_a_model_folder_that_is_called_demo_is_no_embedded_one(llama: Path, here: Path) -> None:
    shutil.copytree(llama, "demo")
    asked = PruneRequest(model="demo", output=Path("out"))
    again = request_from_json(to_json(asked))
    assert again.model == str(here / "demo")
    assert again.calibration_text == asked.calibration_text == "c4"


def test_a_folder_that_is_called_demo_and_has_only_weights_is_meant(here: Path) -> None:
    """The embedded model in its place would be a result of another model."""
    Path("demo").mkdir()
    assert locate("demo") != Path("demo")
    Path("demo", "model.safetensors").touch()
    assert locate("demo") == Path("demo")


@pytest.mark.parametrize(
    ("model", "output", "options", "sentence"),
    [
        ("out.work/model", "out", {}, "MODEL is out.work/model, which must not lie in out.work:"),
        ("out.work", "out", {}, "MODEL is out.work, which must not lie in out.work:"),
        ("out.partial/model", "out", {}, "MODEL is out.partial/model, which must not lie in out.p"),
        ("link/model", "out", {}, "MODEL is link/model, which must not lie in out.work:"),
        ("m.work/m", None, {"work_dir": "."}, "MODEL is m.work/m, which must not lie in "),
        (
            "m",
            "out",
            {"calibration": "out.work/t.txt"},
            "text is .*t.txt, which must not lie in ou",
        ),
        ("m", "x.work/x", {"work_dir": "."}, "OUTPUT is x.work/x, which must not lie in x.work:"),
        ("m", "out", {"work_dir": "out"}, "the work folder is out/out.work, which must not lie in"),
        ("m", "out", {"work_dir": "out.partial"}, "the work folder is .*, which must not lie in o"),
        ("m", "x/x.work", {"work_dir": "x/x.work/.."}, None),
        ("m", "out", {"work_dir": "m"}, None),
        ("m", "m/out", {}, None),
        ("m", None, {"work_dir": "m"}, None),
        ("owner/model", "owner.work/out", {"work_dir": "other"}, None),
    ],
)
def test_a_place_that_the_run_removes_is_refused(
    model: str, output: str | None, options: dict[str, str], sentence: str | None, here: Path
) -> None:
    Path("out.work").mkdir()
    Path("link").symlink_to("out.work")
    if model != "owner/model":
        Path(model).mkdir(parents=True, exist_ok=True)
    if "calibration" in options:
        Path(options["calibration"]).touch()
    request = PruneRequest(
        model=model,
        output=None if output is None else Path(output),
        in_place=output is None,
        calibration=options.get("calibration"),
        work_dir=Path(options["work_dir"]) if "work_dir" in options else None,
    )
    if sentence is None:
        check_apart(request, paths_of(request))
        return
    with pytest.raises(RequestError, match=sentence):
        check_apart(request, paths_of(request))


def test_the_command_line_refuses_it_too_and_the_model_stays(
    llama: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, "out.work/model")
    Path("out.work", MARK).touch()
    assert main(["prune", "out.work/model", "out"]) == 2
    assert "must not lie in out.work: that is made and removed by" in capsys.readouterr().err
    assert Path("out.work/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")],
    ids=["folder", "file", "dangling link"],
)
@pytest.mark.parametrize("at_the_last_moment", [False, True])
def test_an_output_that_somebody_else_made_meanwhile_stays(
    at_the_last_moment: bool,
    make: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial, final = tmp_path / "out.partial", tmp_path / "out"
    partial.mkdir()
    rename = os.rename

    def late(*args: Any) -> None:
        final.mkdir()
        (final / "thesis.txt").touch()
        rename(*args)

    if at_the_last_moment:
        monkeypatch.setattr(os, "rename", late)
    else:
        make(final)
    with pytest.raises(JobError, match=r"out exists by now: .* then give the same command again"):
        publish_folder(partial, final)
    assert partial.is_dir()
    assert os.path.lexists(final)


def test_a_run_whose_output_appears_meanwhile_can_be_gone_on_with(
    llama: Path, here: Path, text_file: Path
) -> None:
    def listener(tick: Any) -> None:
        if tick.stage == "finish":
            Path("out").mkdir()

    options: dict[str, Any] = {"nsamples": 2, "seqlen": 32, "calibration": str(text_file)}
    with pytest.raises(JobError, match="out exists by now"):
        lowmem_gblm.prune(llama, "out", listener=listener, **options)
    Path("out").rmdir()
    assert lowmem_gblm.prune(llama, "out", **options)["attempts"] == 2
    assert [path.name for path in here.iterdir()] == ["out"]


def test_a_folder_that_is_gone_has_no_side_files_silently(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(side_files(tmp_path / "nowhere"))


def test_a_folder_in_a_model_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").touch()
    scandir = os.scandir

    def failing(path: str) -> Any:
        if Path(path).name == "sub":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        list(side_files(tmp_path))
