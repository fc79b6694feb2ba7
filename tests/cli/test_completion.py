"""Completion: the scripts are those of the parser, and shells that are here complete by them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from lowmem_gblm.cli.completion import SHELLS
from lowmem_gblm.cli.main import main

# What is typed, and with what it may go on.
TYPED = [
    ("lowmem-gblm pr", ["prune"]),
    ("lowmem-gblm prune demo out --spar", ["--sparsity"]),
    ("lowmem-gblm prune demo out --dtype b", ["bfloat16"]),
    ("lowmem-gblm completion fi", ["fish"]),
]
ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
"$(complete -p lowmem-gblm | sed 's/.*-F \\([^ ]*\\).*/\\1/')" "$1" "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
ASK_FISH = "source $argv[1]; complete -C $argv[2] | string split -f1 \\t"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script of every shell in a file, as `lowmem-gblm completion SHELL` prints it."""
    found = {}
    for shell in SHELLS:
        with redirect_stdout(io.StringIO()) as printed:
            assert main(["completion", shell]) == 0
        found[shell] = tmp_path_factory.mktemp(shell) / "script"
        found[shell].write_text(printed.getvalue())
    return found


def answer(shell: str, *argv: object) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    done = subprocess.run([shell, *map(str, argv)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(shell: str, scripts: dict[str, Path]) -> None:
    assert answer(shell, "-n", scripts[shell]) == []


@pytest.mark.parametrize(("typed", "completed"), TYPED)
def test_bash_completes(typed: str, completed: list[str], scripts: dict[str, Path]) -> None:
    words = typed.split()
    assert answer("bash", "-c", ASK_BASH, "bash", scripts["bash"], *words) == completed


@pytest.mark.parametrize(("typed", "completed"), TYPED)
def test_fish_completes(typed: str, completed: list[str], scripts: dict[str, Path]) -> None:
    assert answer("fish", "-c", ASK_FISH, scripts["fish"], typed) == completed


def test_what_is_a_folder_is_completed_as_one(scripts: dict[str, Path]) -> None:
    script = scripts["bash"].read_text()
    for folder in ("prune_pos_0", "prune___work_dir", "resume_pos_0", "verify___against"):
        assert f"_{folder}_COMPGEN=_shtab_compgen_dirs\n" in script
    assert "_prune___calibration_COMPGEN=_shtab_compgen_files\n" in script


def test_the_script_is_an_object_for_programs(
    capsys: pytest.CaptureFixture[str], scripts: dict[str, Path]
) -> None:
    assert main(["completion", "bash", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{told['script']}\n" == scripts["bash"].read_text()
