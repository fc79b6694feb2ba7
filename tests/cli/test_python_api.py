"""The Python API: typed, documented, and no wrong value gets through to code that cannot say so."""

from __future__ import annotations

import inspect
import io
import json
import pydoc
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_type_hints

import mypy.api
import pytest
import torch

import lowmem_gblm
from lowmem_gblm import ProgressBar, Tick
from lowmem_gblm.api import runs
from lowmem_gblm.commands.compare.grid import EVALUATION, Grid
from lowmem_gblm.commands.pattern_rules import as_patterns, as_sparsities
from lowmem_gblm.commands.request import MAY_CHANGE, EvalRequest, PruneRequest, to_json
from lowmem_gblm.commands.texts import as_calibration, as_text
from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.methods import built_in_names, find_method
from lowmem_gblm.methods.gblm import as_alpha
from lowmem_gblm.methods.masks import as_pattern, as_sparsity
from lowmem_gblm.options import options, parse_bytes, parse_names
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.job_state import DESCRIBED, DESCRIPTION
from lowmem_gblm.storage.locking import MARK

Place = str | PathLike[str]


class Calibration:
    """Stands for the alias of that name, which names types of torch."""


# The type of a parameter, by what its option is parsed with.
TYPES: dict[Any, Any] = {
    str: str,
    int: int,
    float: float,
    bool: bool,
    Path: Place,
    parse_bytes: int | str,
    parse_names: str | Sequence[str],
    as_sparsity: str | float | Decimal,
    as_pattern: str | tuple[int, int],
    as_sparsities: str | float | Decimal | Mapping[str, str | float | Decimal],
    as_patterns: str | tuple[int, int] | Mapping[str, str | tuple[int, int]],
    as_calibration: Calibration,
    as_text: Place,
    as_alpha: float | str,
}
IN_PLACE = {"in_place", "overwrite_my_only_copy", "in_place_shared"}
STATISTICS = {"save_statistics", "statistics_dtype", "statistics"}
OTHERS = {"recipe", "model", "output", "folder", "work_folder", "method_options", "listener"}


def declared(*kinds: type[Any]) -> dict[str, Field[Any]]:
    return {one.name: one for kind in kinds for one in options(kind)}


METHODS = declared(*(find_method(name).options for name in built_in_names()))
PRUNE = declared(PruneRequest) | METHODS
COMPARE = declared(PruneRequest) | METHODS | declared(Grid)
COMPARE |= {name: one for name, one in declared(EvalRequest).items() if name in EVALUATION}
for name in {"method", "seed"} | IN_PLACE | STATISTICS:
    del COMPARE[name]
FUNCTIONS = {
    lowmem_gblm.prune: PRUNE,
    lowmem_gblm.plan: PRUNE,
    lowmem_gblm.resume: {name: PRUNE[name] for name in MAY_CHANGE},
    lowmem_gblm.evaluate: declared(EvalRequest),
    lowmem_gblm.compare: COMPARE,
}


def type_of(one: Field[Any]) -> Any:
    choices = one.metadata["choices"]
    found = Literal[choices] if choices else TYPES[one.metadata["parse"]]
    return str | Sequence[str] if one.metadata["repeat"] else found


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
def test_parameters_are_the_options(function: Callable[..., Any]) -> None:
    """Names, types and defaults; None stands for the default of a method."""
    expected = FUNCTIONS[function]
    names = {**vars(runs), "Calibration": Calibration, "Listener": Listener}
    hints = get_type_hints(inspect.unwrap(function), names)
    if function is lowmem_gblm.plan:
        hints = get_type_hints(lowmem_gblm.prune, names)
    parameters = inspect.signature(function).parameters
    assert parameters.keys() - OTHERS == expected.keys()
    for name, one in expected.items():
        kind, default = type_of(one), one.default
        several = one.metadata["several"] or (expected is COMPARE and name in METHODS)
        if several:
            kind = kind | Sequence[kind]
        if name == "seeds":
            default = 0
        if default is None or name in METHODS:
            kind, default = kind | None, None
        assert hints[name] == kind, name
        assert name == "methods" or parameters[name].default == default, name


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
def test_help_says_what_every_parameter_means(function: Callable[..., Any]) -> None:
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    for name in inspect.signature(function).parameters:
        assert f"\n        {name}: " in text or name == "against", name
    for one in FUNCTIONS[function].values():
        assert one.metadata["help"][:30] in " ".join(text.split())


def test_help_of_a_method_s_option_says_whose_it_is() -> None:
    assert "\n    alpha: gblm: weight of the gradient term; auto: " in lowmem_gblm.prune.__doc__


def test_the_package_is_imported_without_torch() -> None:
    """Even its functions are at hand before torch is."""
    script = "import lowmem_gblm, sys; lowmem_gblm.prune; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# Wrong values, by what an option is parsed with.
WRONG: dict[Any, list[Any]] = {
    str: [5, 1.5, b"text", ["a", "b"], None],
    int: ["5", 1.5, True, None, "many", float("nan"), [3]],
    float: ["5", True, [1.0], float("nan"), float("inf"), -1.0, 1j],
    bool: [0, "yes", None, []],
    Path: [5, b"folder", "a\0b", "a" * 300, ["folder"]],
    parse_bytes: [-5, 1.5, "24", "24 parsecs", True, ["1GiB"], "", b"1GiB"],
    parse_names: [5, [5], None, [None]],
    as_sparsity: [0, 1, -0.5, 1.5, True, "half", float("nan"), float("inf"), {0.5}, b"0.5"],
    as_pattern: [24, "2", "4:2", "2:4:8", "a:b", (2,), (2, 4, 8), [2, 4], 0.5, (4, 2), "1.5:4"],
    as_calibration: [
        "",
        5,
        True,
        b"text",
        "a\0b",
        [],
        ["text", 5],
        [[]],
        [[1.5, 2.5]],
        [[1, 2], [3]],
    ],
    as_text: ["", 5, ["a text"], "a\0b", "word " * 100],
    "choices": ["other", 5, None, [], ("auto",)],
    "repeat": [5, [5], None, {"a": 1}],
}
WRONG[as_alpha] = [*WRONG[float], "much", b"auto"]
WRONG[as_alpha].remove("5")
# By glob over the names of tensors, too.
for by_glob, one in ((as_sparsities, as_sparsity), (as_patterns, as_pattern)):
    WRONG[by_glob] = [*WRONG[one], {}, {5: WRONG[one][0]}, *({"*": value} for value in WRONG[one])]
WRONG[as_calibration] += [
    [[1]],
    [[-1, 2]],
    torch.rand(2, 8),
    torch.arange(8),
    torch.ones(2, 1, 2, 8).long(),
    object(),
    {"a": 1},
]


# Of what is no option, and more of some options.
WRONG_PLACES = [5, None, b"model", "a\0b", "a" * 300]
WRONG_METHOD_OPTIONS = [5, ["alpha"], {"alpha": "x"}, {5: 1}, {"alhpa": 1}, {"nsamples": 1}]
MORE: list[tuple[Callable[..., Any], str, list[Any]]] = [
    *(
        (function, "model", WRONG_PLACES)
        for function in FUNCTIONS
        if function != lowmem_gblm.resume
    ),
    *((function, "listener", [5, "bar"]) for function in FUNCTIONS if function != lowmem_gblm.plan),
    (lowmem_gblm.prune, "output", [5, b"out", "a\0b"]),
    (lowmem_gblm.prune, "method_options", WRONG_METHOD_OPTIONS),
    (lowmem_gblm.compare, "method_options", [5, {"alpha": "x"}, {"alpha": []}, {"alhpa": 1}]),
    (lowmem_gblm.compare, "methods", [[], "", ["no"], ["gblm"] * 2]),
    (lowmem_gblm.compare, "seeds", [[], ()]),
    (lowmem_gblm.compare, "folder", WRONG_PLACES),
    (lowmem_gblm.resume, "work_folder", WRONG_PLACES),
    (lowmem_gblm.verify, "output", WRONG_PLACES),
    (lowmem_gblm.verify, "against", [5, b"out", "a\0b", ["out"]]),
    (lowmem_gblm.report, "output", WRONG_PLACES),
    (lowmem_gblm.report, "against", [5, b"out", "a\0b", [5]]),
    (lowmem_gblm.report, "html", [5, "a\0b", b"page"]),
    (lowmem_gblm.pack, "output", WRONG_PLACES),
    (lowmem_gblm.pack, "packed", WRONG_PLACES),
    (lowmem_gblm.unpack, "packed", WRONG_PLACES),
    (lowmem_gblm.unpack, "output", WRONG_PLACES),
    (lowmem_gblm.upload, "output", WRONG_PLACES),
    (lowmem_gblm.upload, "repo", WRONG_PLACES),
    (lowmem_gblm.upload, "against", [5, b"out", "a\0b", ["out"]]),
]


def wrong_values() -> Iterable[Any]:
    """Every parameter of every function, with values of other types, and out of range."""
    found = defaultdict(list)
    for function, name, values in MORE:
        found[function, name] += values
    for function, expected in FUNCTIONS.items():
        for name, one in expected.items():
            several = one.metadata["several"] or (expected is COMPARE and name in METHODS)
            for value in WRONG[kind_of(one)]:
                unset = value is None and (one.default is None or name in METHODS)
                if not unset and not (several and isinstance(value, (list, tuple))):
                    found[function, name].append(value)
    for (function, name), values in found.items():
        yield pytest.param(function, name, values, id=f"{function.__name__}-{name}")


def kind_of(one: Field[Any]) -> Any:
    return next(
        (name for name in ("choices", "repeat") if one.metadata[name]), one.metadata["parse"]
    )


@pytest.fixture(scope="module")
def required(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """What every function needs; the model is nowhere, as nobody looks for it before."""
    folder = tmp_path_factory.mktemp("calls")
    model, work = folder / "no-model", folder / "out.work"
    work.mkdir()
    (work / MARK).touch()
    request = to_json(PruneRequest(model="demo", output=folder / "out"))
    described = {name: {} for name in DESCRIBED} | {"folder": str(work), "request": request}
    (work / DESCRIPTION).write_text(json.dumps(described))
    return {
        lowmem_gblm.prune: {"model": model, "output": folder / "out"},
        lowmem_gblm.plan: {"model": model},
        lowmem_gblm.resume: {"work_folder": work},
        lowmem_gblm.evaluate: {"model": model},
        lowmem_gblm.compare: {"model": model, "methods": ["gblm"], "folder": folder / "compared"},
        lowmem_gblm.pack: {"output": model, "packed": folder / "packed"},
        lowmem_gblm.upload: {"output": folder / "out", "repo": "me/x"},
        lowmem_gblm.unpack: {"packed": model, "output": folder / "unpacked"},
        lowmem_gblm.verify: {"output": folder / "out"},
        lowmem_gblm.report: {"output": folder / "out"},
    }


@pytest.mark.parametrize(("function", "name", "values"), list(wrong_values()))
def test_a_wrong_value_is_refused_in_a_sentence(
    function: Callable[..., Any], name: str, values: list[Any], required: dict[Any, dict[str, Any]]
) -> None:
    for value in values:
        with pytest.raises(RequestError) as refused:
            function(**{**required[function], name: value})
        assert len(str(refused.value).split()) > 3


def test_a_missing_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no job: give the OUTPUT"):
        lowmem_gblm.resume(tmp_path)


def test_a_listener_of_another_type_is_named() -> None:
    with pytest.raises(RequestError, match="the listener must be a function of a Tick, as Progr"):
        lowmem_gblm.prune("demo", "out", listener="bar")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nsamples": "5"}, "--nsamples must be an integer; got '5'"),
        ({"seed": True}, "--seed must be an integer; got True"),
        ({"alpha": "big"}, "--alpha must be auto or a number from 0 on; got big"),
        ({"alpha": True}, "--alpha must be auto or a number from 0 on; got True"),
        ({"in_place": "yes"}, "--in-place must be True or False; got 'yes'"),
        ({"device": 0}, "--device must be a text; got 0"),
        ({"statistics": 5}, "--statistics must be a path; got 5"),
        ({"dtype": "float8"}, "--dtype must be one of auto, float32, bfloat16, float16; got 'flo"),
        ({"cpu_memory": "24"}, "a size needs a unit: 24GiB, 24MiB or 24B"),
        ({"cpu_memory": [24]}, r"--cpu-memory cannot be \[24\]"),
        ({"pattern": 24}, r'the pattern must read "2:4" or \(2, 4\); got 24'),
        ({"method_options": 5}, "method_options must be a dictionary; got 5"),
        ({"calibration": ""}, "--calibration is an empty name: leave it out for the default"),
        ({"calibration": 5}, "the calibration must be a file, a name, a list of texts or of tok"),
        ({"calibration": [[1]]}, "calibration samples must be integers from 0 on, at least 2"),
    ],
)
def test_the_sentence_names_the_option_and_the_value(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        lowmem_gblm.plan("demo", **options)


def test_every_kind_of_right_value_means_what_is_typed(tmp_path: Path) -> None:
    given = PruneRequest(
        model=tmp_path, output=str(tmp_path / "out"), pattern=(2, 4), cpu_memory="24GiB", disk=5,
        include="*.mlp.*", work_dir=str(tmp_path), method_options={"alpha": 10},
    )  # fmt: skip
    assert (given.model, given.output) == (str(tmp_path), tmp_path / "out")
    assert (given.pattern, given.cpu_memory, given.disk) == ("2:4", 24 << 30, 5)
    assert (given.include, given.work_dir, given.options.alpha) == (("*.mlp.*",), tmp_path, 10.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": []}, "--seeds is empty: give at least one value"),
        ({"method_options": {"alpha": []}}, "--alpha is empty: give at least one value"),
    ],
)
def test_nothing_is_no_value_of_a_grid(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        lowmem_gblm.compare("demo", "gblm", "out", **options)


def test_one_pattern_as_a_tuple_is_one_pattern_of_a_grid() -> None:
    assert Grid(pattern=(2, 4)).pattern == ("2:4",)
    assert Grid(pattern=[(2, 4), "4:8"], sparsity=0.5).pattern == ("2:4", "4:8")


PROGRAM = """
from pathlib import Path
import lowmem_gblm as gblm
gblm.prune("demo", Path("out"), pattern=(2, 4), cpu_memory="24GiB", alpha=10, calibration=["a"])
gblm.plan("demo", method="wanda", disk=5, include="*.mlp.*")["flops"]
gblm.compare("demo", ["gblm"], "out", alpha=[1, 10], pattern=[(2, 4), "4:8"])[0]["perplexity"]
gblm.evaluate("out", text=Path("a.txt"), listener=gblm.ProgressBar())
gblm.resume("out.work", gpu_memory=1 << 30, listener=print)
gblm.report("out", against="other", html="page.html")
gblm.prune("demo", "out", nsamples="16")
gblm.prune("demo", "out", activations="dens")
gblm.prune("demo", "out", nsampels=16)
gblm.plan("demo", pattern=24)
gblm.plan(5)
gblm.compare("demo", 5, "out")
gblm.evaluate("demo", windows=1.5)
gblm.resume(5)
gblm.verify("out", against=["demo"])
gblm.prune("demo", "out", listener=5)
gblm.prune("demo", "out", calibration=5)
"""
WRONG_FROM = 10
# Of a calibration only where the types of torch are read.
WRONG_CALIBRATION = 20


def wrong_lines(tmp_path: Path, config: str) -> list[int]:
    """Lines of the program in which mypy finds something, by way of a configuration."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(config)
    cache, package = f"--cache-dir={tmp_path}", Path(lowmem_gblm.__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(package))
        arguments = [str(tmp_path / "program.py"), f"--config-file={tmp_path / 'mypy.ini'}", cache]
        found, failed, _ = mypy.api.run(arguments)
    assert not failed, failed
    return sorted({int(line) for line in re.findall(r"^\S*program\.py:(\d+): error", found, re.M)})


# What lies below the functions is left out: it takes half a minute, and does not change the answer.
FUNCTIONS_ALONE = """
[mypy]
follow_imports = skip
strict = true
[mypy-lowmem_gblm,lowmem_gblm.api.*,lowmem_gblm.runtime.progress,lowmem_gblm.runtime.progress_bar,lowmem_gblm.commands.texts,lowmem_gblm.commands.tables,lowmem_gblm.commands.signatures,numbers,os,pathlib,decimal,builtins,typing,collections.*,_typeshed.*,types,abc]
follow_imports = silent
"""


def test_mypy_finds_wrong_arguments_in_a_program(tmp_path: Path) -> None:
    assert wrong_lines(tmp_path, FUNCTIONS_ALONE) == [*range(WRONG_FROM, WRONG_CALIBRATION)]


@pytest.mark.slow
def test_mypy_finds_wrong_arguments_in_a_program_as_a_user_runs_it(tmp_path: Path) -> None:
    found = wrong_lines(tmp_path, "[mypy]\nignore_missing_imports = true\n")
    assert found == [*range(WRONG_FROM, WRONG_CALIBRATION + 1)]


def test_a_progress_bar_shows_every_stage_and_the_time_left(tmp_path: Path) -> None:
    shown = io.StringIO()
    bar = ProgressBar(file=shown, mininterval=0)
    size = {"method": "wanda", "nsamples": 2, "seqlen": 32}
    lowmem_gblm.prune("demo", tmp_path / "out", listener=bar, **size)
    text = shown.getvalue()
    for stage in ("embed", "prune", "finish"):
        assert re.search(rf"{stage}: 100%.* (\d+)/\1 .*peak \d+\.\d GiB", text), text
    assert "00:00 left in all" in text


def test_a_progress_bar_begins_anew_where_a_stage_does() -> None:
    shown = io.StringIO()
    bar = ProgressBar(file=shown, mininterval=0)
    for step in (1, 2, 1):
        bar(Tick(stage="score", step=step, steps=3, stage_s=1.0, left_s=None, peak_bytes=1 << 30))
    bar.close()
    assert shown.getvalue().count("score:   0%") == 2
