"""The architecture, held by tests: imports flow one way, files stay small, one file prints."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lowmem_gblm
from lowmem_gblm import errors

HERE = Path(__file__)
PACKAGE = Path(lowmem_gblm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Floors, top down: a module imports only from its own room and from floors below it. Rooms on one
# floor do not know each other.
ROWS = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("api",),
    ("commands",),
    ("sweeps",),
    ("model",),
    ("storage",),
    ("methods", "planning", "runtime"),
    ("options", "extensions", "embedded"),
    ("errors",),
)
# Its strings are the words of children's stories.
STORIES = "tools/story_tables.py"
PYTHON = "#!/usr/bin/env python3"
# Words that stand for an idea which has another word here: resume, start over, non-finite,
# untrusted, what to do, seen, declares, complete, user; and data that is stored does not wait.
BANNED = re.compile(
    r"\b(go(es|ing|ne)? on (with|from)|to go on|beg[iau]ns? anew|sick|strangers?|ways? out"
    r"|waits? (in|between)|met|claims?|whole|nights?|nobody|somebody|persons?|so much)\b",
    re.IGNORECASE,
)
ARITHMETIC = ("methods", "planning", "commands.request", "commands.report.structure")
ERRORS = {name for name, one in vars(errors).items() if isinstance(one, type)}


def module_name(path: Path) -> str:
    """ "sweeps.dense" for lowmem_gblm/sweeps/dense.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room(module: str) -> str:
    return module.split(".")[0]


def row(module: str) -> int:
    return next(index for index, names in enumerate(ROWS) if room(module) in names)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    modules = {module_name(source) for source in SOURCES}
    prefix = "lowmem_gblm."
    return {
        name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)
    } & modules


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_flow_downwards(path: Path) -> None:
    here = module_name(path)
    assert not {
        name for name in own_imports(path) if room(name) != room(here) and row(name) <= row(here)
    }


def test_every_room_has_a_floor() -> None:
    rooms = {room(module_name(path)) for path in SOURCES}
    assert sorted(rooms) == sorted(name for names in ROWS for name in names)


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({module_name(path): own_imports(path) for path in SOURCES}).prepare()


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if module_name(path).startswith(ARITHMETIC)], ids=module_name
)
def test_arithmetic_touches_no_model_and_no_file(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {
        "transformers",
        "os",
        "safetensors",
    }
    assert not {name for name in own_imports(path) if room(name) in ("storage", "model")}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [call for call in calls if getattr(call.func, "id", None) == "print"]
    assert not prints or module_name(path) in ("cli.console", "cli.main")


def test_only_the_publishing_module_renames() -> None:
    renaming = {module_name(path) for path in SOURCES if "os.rename" in path.read_text()}
    assert renaming == {"storage.atomic"}


def test_one_file_knows_the_types_of_devices() -> None:
    """Elsewhere they are named in help alone."""
    named = re.compile(r"\b(cuda|xpu|mps|hip|rocm)\b", re.IGNORECASE)
    found = {
        module_name(path)
        for path in SOURCES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type in (tokenize.NAME, tokenize.STRING) and named.search(token.string)
        if not token.string.startswith('"""')
    }
    assert found == {"runtime.accelerator", "planning.resources"}


def test_no_module_hides_a_function_of_the_api() -> None:
    assert not {module_name(path) for path in SOURCES} & set(lowmem_gblm.__all__)


def test_the_api_has_what_it_names() -> None:
    assert all(hasattr(lowmem_gblm, name) for name in lowmem_gblm.__all__)
    assert not hasattr(lowmem_gblm, "something_else")


def test_no_room_is_a_hall() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert max(lengths.values()) <= 400, lengths


def texts(tree: ast.AST) -> list[str]:
    """Constant pieces of text: blanks are single, escapes of regular expressions undone."""
    constants = [one.value for one in ast.walk(tree) if isinstance(one, ast.Constant)]
    pieces = [" ".join(one.split()) for one in constants if isinstance(one, str)]
    return [re.sub(r"\\(.)", r"\1", piece) for piece in pieces]


def messages(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Of every error that a file makes: the line, and the constant pieces of what it says."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS:
            yield node.lineno, texts(node)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page; of a script its comments, and its texts of several words."""
    content = path.read_text()
    if path.suffix == ".md":
        yield from enumerate(content.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())


def test_prose_has_one_word_for_an_idea() -> None:
    root = PACKAGE.parent
    tools = [path for path in (root / "tools").iterdir() if path.is_file()]
    scripts = [
        path for path in tools if path.suffix == ".py" or path.read_text().startswith(PYTHON)
    ]
    found = []
    for path in [*SOURCES, *scripts, root / "README.md"]:
        name = path.relative_to(root).as_posix()
        if not name.startswith(STORIES):
            words = ((at, BANNED.search(line)) for at, line in prose(path))
            found += [f"{name}:{at}: {word[0]}" for at, word in words if word]
    assert not found, "\n".join(found)


def threes(piece: str) -> list[str]:
    words = piece.split()
    return [" ".join(words[first : first + 3]) for first in range(len(words) - 2)]


def test_every_message_is_asserted() -> None:
    """Of what an error says, three words in a row must be in a test; shorter ones are skipped."""
    tests = [path for path in HERE.parent.rglob("*.py") if path != HERE]
    asserted = "\n".join(piece for path in tests for piece in texts(ast.parse(path.read_text())))
    forgotten = []
    for path in SOURCES:
        for line, pieces in messages(path):
            said = [words for piece in pieces for words in threes(piece)]
            if said and not any(words in asserted for words in said):
                forgotten.append(f"{path.relative_to(PACKAGE)}:{line}: {'…'.join(pieces)}")
    assert not forgotten, "\n".join(forgotten)
