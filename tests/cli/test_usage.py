"""What is typed wrong, and how loud a command is: usage, nearest names, --json, -q, -v."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowmem_gblm.cli.console import Console
from lowmem_gblm.cli.main import main
from lowmem_gblm.cli.parser import _parser
from lowmem_gblm.cli.usage import METHOD_OPTIONS
from lowmem_gblm.methods import method_names
from lowmem_gblm.runtime.progress import Tick
from support.crashes import ctrl_c

COMMANDS = [
    "prune", "resume", "plan", "eval", "compare", "verify", "report", "pack", "unpack",
    "demo", "completion",
]  # fmt: skip


@dataclass
class Answer:
    """What one command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Runs a command line, given as one string, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def answer(line: str) -> Answer:
        code = main(line.split())
        return Answer(code, *capsys.readouterr())

    return answer


def fails(error: BaseException) -> Callable[..., None]:
    def failing(*given: object, **options: object) -> None:
        raise error

    return failing


def subparsers() -> dict[str, argparse.ArgumentParser]:
    [commands] = _parser(method_names())._subparsers._group_actions
    return commands.choices


# Groups.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_a_group_that_says_what_it_is_about(command: str) -> None:
    [plain] = [one for one in subparsers()[command]._action_groups if one.title == "options"]
    assert [one.dest for one in plain._group_actions] == ["help"]


def test_the_help_of_prune_begins_with_what_to_prune() -> None:
    titles = re.findall(r"^([a-z][a-z ]+):$", subparsers()["prune"].format_help(), re.MULTILINE)
    assert titles[2:] == [
        "what to prune",
        "options of methods",
        "texts and samples",
        "statistics",
        "machine and budgets",
        "in place",
        "output",
    ]


def test_options_of_methods_have_a_group_of_their_own() -> None:
    groups = subparsers()["prune"]._action_groups
    [group] = [one for one in groups if one.title == METHOD_OPTIONS]
    assert {"alpha", "gradient_norm"} <= {one.dest for one in group._group_actions}


# What is misspelt.


@pytest.mark.parametrize(
    ("line", "command", "sentence"),
    [
        (
            "prune demo out --metod wanda",
            "prune",
            "unrecognized arguments: --metod wanda; --metod: did you mean --method?",
        ),
        ("plan demo --metod=wanda", "plan", "--metod: did you mean --method?"),
        ("eval demo --txt demo", "eval", "--txt: did you mean --text?"),
        ("verify out --agianst demo", "verify", "--agianst: did you mean --against?"),
        ("demo --ouput here", "demo", "--ouput: did you mean --output?"),
        ("plan demo --nonsense", "plan", "unrecognized arguments: --nonsense\n"),
        ("plan demo -- two", "plan", "unrecognized arguments: two\n"),
        ("plan demo --dtype bfloat61", "plan", "did you mean bfloat16?"),
        ("compare demo --keep al", "compare", "did you mean all?"),
        ("plan", "plan", "the following arguments are required: MODEL"),
        ("prun demo out", "", "(choose from"),
        ("prun demo out", "", "; did you mean prune?"),
        ("evaluate demo", "", "; did you mean eval?"),
        ("--verson plan demo", "", "--verson: did you mean --version?"),
    ],
)
def test_a_misspelt_word_gets_its_own_usage_and_the_nearest_name(
    line: str, command: str, sentence: str, run: Callable[..., Answer]
) -> None:
    answer = run(line)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"usage: lowmem-gblm {command}".rstrip())
    assert sentence in answer.err.splitlines(keepends=True)[-1]


@pytest.mark.parametrize("line", ["plan demo --spars 0.5", "--vers plan demo", "eval demo --js"])
def test_a_beginning_is_no_option(line: str, run: Callable[..., Answer]) -> None:
    answer = run(line)
    assert (answer.code, answer.out) == (2, "")
    assert "unrecognized arguments" in answer.err


# Failures for programs.


@pytest.mark.parametrize(
    ("line", "code", "kind", "message"),
    [
        ("eval demo --windows 0 --json", 2, "RequestError", "--windows must be at least 1; got 0"),
        ("plan nowhere/at/all --json", 3, "CheckpointError", "there is no model folder nowhere"),
        ("plan demo --cpu-memory 1MiB --json", 4, "BudgetError", "this run needs at least"),
        ("resume out.work --json", 5, "JobError", "out.work holds no job"),
        ("plan demo --json --metod", 2, "UsageError", "--metod: did you mean --method?"),
        ("prun --json", 2, "UsageError", "did you mean prune?"),
    ],
)
def test_a_failure_is_one_object_for_programs_and_a_sentence_for_readers(
    line: str, code: int, kind: str, message: str, run: Callable[..., Answer]
) -> None:
    answer = run(line)
    assert answer.code == code
    told = json.loads(answer.out)
    assert told == {"error": {"code": code, "kind": kind, "message": told["error"]["message"]}}
    assert message in told["error"]["message"]
    assert answer.err.endswith(f"lowmem-gblm: {told['error']['message']}\n")


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (PermissionError(13, "Permission denied", "/x"), 2, "PermissionError"),
        (OSError(28, "No space left on device"), 4, "OSError"),
        (MemoryError("6 GiB"), 4, "MemoryError"),
    ],
)
def test_so_is_an_error_of_the_system(
    error: Exception,
    code: int,
    kind: str,
    run: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lowmem_gblm.commands.evaluate.evaluate", fails(error))
    answer = run("eval demo --json")
    told = json.loads(answer.out)["error"]
    assert (answer.code, told["code"], told["kind"]) == (code, code, kind)


def test_so_is_an_interruption(run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_gblm.commands.evaluate.evaluate", ctrl_c)
    answer = run("eval demo --json")
    told = json.loads(answer.out)["error"]
    assert (answer.code, told["code"], told["kind"]) == (130, 130, "KeyboardInterrupt")
    assert told["message"].endswith("To begin again:\nlowmem-gblm eval demo --json")


def test_so_is_a_bug_which_keeps_its_traceback(
    run: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lowmem_gblm.commands.evaluate.evaluate", fails(KeyError("what")))
    with pytest.raises(KeyError):
        run("eval demo --json")
    told = json.loads(capsys.readouterr().out)["error"]
    assert told == {"code": 1, "kind": "KeyError", "message": "'what'"}


def test_an_interruption_that_a_library_drops_adds_no_second_object(
    run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(*given: object) -> dict[str, Any]:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return {"perplexity": 2.0}

    monkeypatch.setattr("lowmem_gblm.cli.actions.evaluation_lines", lambda result: [])
    monkeypatch.setattr("lowmem_gblm.commands.evaluate.evaluate", dropping)
    answer = run("eval demo --json")
    assert (answer.code, json.loads(answer.out)) == (130, {"perplexity": 2.0})


# How loud.


def tick(step: int, stage_s: float) -> Tick:
    return Tick(stage="dense", step=step, steps=3, stage_s=stage_s, left_s=None, peak_bytes=2**30)


def test_the_quiet_hear_nothing_until_it_fails(run: Callable[..., Answer]) -> None:
    answer = run("prune demo out --method magnitude -q")
    assert (answer.code, answer.err) == (0, "")
    assert "the checkpoint is out" in answer.out
    answer = run("prune demo out --method magnitude --quiet")
    assert (answer.code, answer.out) == (5, "")
    assert answer.err == (
        "lowmem-gblm: out exists already: choose another OUTPUT, or move it away\n"
    )


def test_the_verbose_see_every_step_and_its_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(sys.stderr, verbose=True) as console:
        console(tick(1, 0.25))
        console(tick(2, 0.5))
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"dense          1/3   0:00:00   peak 1\.0 GiB   0\.\d{3} s", first)
    assert second.startswith("dense          2/3 ")
    with Console(sys.stderr) as console:
        console(tick(1, 0.25))
    assert capsys.readouterr().err == ""


def test_the_verbose_see_where_an_error_comes_from(run: Callable[..., Answer]) -> None:
    answer = run("eval demo --windows 0 -v")
    assert answer.code == 2
    assert "\nTraceback (most recent call last):\n" in answer.err
    assert answer.err.endswith("\nlowmem-gblm: --windows must be at least 1; got 0\n")
    assert "Traceback" not in run("eval demo --windows 0").err


def test_nobody_is_quiet_and_verbose(run: Callable[..., Answer]) -> None:
    assert "-v/--verbose: not allowed with argument -q/--quiet" in run("plan demo -q -v").err
