"""What is installed: which build of torch `tools/install` takes, and what is in the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.metadata import Metadata

import lowmem_gblm
from support.tools import TOOLS, load_tool

ROOT = TOOLS.parent
CPU = "https://download.pytorch.org/whl/cpu"
NOWHERE = "http://127.0.0.1:9/simple"


@pytest.fixture(scope="module")
def torch_index() -> ModuleType:
    return load_tool("torch_index")


@pytest.mark.parametrize(
    ("found", "index", "why"),
    [
        ({}, CPU, "no GPU"),
        ({"gpu": "cuda"}, "", "NVIDIA"),
        ({"gpu": "rocm7.1"}, "https://download.pytorch.org/whl/rocm7.1", "a GPU for this build"),
        ({"gpu": "xpu"}, "https://download.pytorch.org/whl/xpu", "a GPU for this build"),
        ({"system": "darwin"}, "", "no CUDA"),
        ({"system": "win32", "gpu": "cuda"}, "", "no CUDA"),
        ({"configured": True}, "", "pip is configured"),
        ({"has_torch": True}, "", "installed already"),
    ],
)
def test_the_build_follows_from_the_machine(
    torch_index: ModuleType, found: dict[str, object], index: str, why: str
) -> None:
    choice = torch_index.choose("", torch_index.Machine(**found))
    assert choice.index == index
    assert why in choice.why


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        ("pypi", ""),
        ("cpu", CPU),
        ("cu130", "https://download.pytorch.org/whl/cu130"),
        ("https://mirror.example/simple", "https://mirror.example/simple"),
    ],
)
def test_the_variable_has_the_last_word(torch_index: ModuleType, asked: str, index: str) -> None:
    machine = torch_index.Machine(has_torch=True, configured=True, gpu="cuda")
    assert torch_index.choose(asked, machine).index == index


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ({}, None),
        ({"dev/nvidiactl": "", "dev/kfd": ""}, "cuda"),
        ({"dev/kfd": ""}, None),
        ({"dev/kfd": "", "opt/rocm/.info/version": "7.1.0-42\n"}, "rocm7.1"),
        ({"dev/dri": ""}, "xpu"),
    ],
)
def test_a_gpu_is_one_with_its_driver(
    torch_index: ModuleType, files: dict[str, str], index: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch_index.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch_index.ctypes.util, "find_library", lambda name: "libze_intel_gpu.so")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert torch_index.gpu_index(tmp_path) == index


@pytest.mark.parametrize(
    ("listed", "configured"),
    [
        ("", False),
        (":env:.cert='/etc/ca.crt'\nglobal.constraint='/etc/xdg/pip/constraints.txt'\n", False),
        (":env:.find-links='/opt/wheels'\n", True),
        ("global.extra-index-url='https://mirror.example/simple'\n", True),
        ("global.index-url='https://mirror.example/simple'\n", True),
    ],
)
def test_what_pip_is_configured_for_is_kept(
    torch_index: ModuleType, listed: str, configured: bool
) -> None:
    assert torch_index.is_configured(listed) is configured


def test_an_index_that_cannot_be_reached_ends_with_what_to_do() -> None:
    asked = {"TORCH_INDEX": NOWHERE, "PATH": os.environ["PATH"]}
    command = [sys.executable, TOOLS / "torch_index"]
    done = subprocess.run(command, env=asked, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    chosen, failed = done.stderr.splitlines()
    assert chosen.startswith(f"tools/install: torch from {NOWHERE}: TORCH_INDEX says")
    assert "cannot be reached" in failed
    assert "TORCH_INDEX=pypi takes torch from pip's own indexes" in failed


def test_without_the_index_for_this_machine_pip_takes_its_own(
    torch_index: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(torch_index, "choose", lambda *_: torch_index.Choice(NOWHERE, "no GPU"))
    torch_index.main()
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert f"{NOWHERE} cannot be reached" in captured.err
    assert "torch comes from pip's own indexes instead" in captured.err


def test_the_wheel_has_every_file_of_the_package_and_says_what_it_is(tmp_path: Path) -> None:
    """Built from a copy: building writes beside what it builds."""
    pytest.importorskip("setuptools", minversion="77")
    source, name = tmp_path / "source", "lowmem_gblm"
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {one for one in archive.namelist() if one.startswith(f"{name}/")}
        info = f"{name}-{lowmem_gblm.__version__}.dist-info"
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"), validate=True)
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"lowmem-gblm = lowmem_gblm.cli.main:main" in archive.read(
            f"{info}/entry_points.txt"
        )
    files = (path for path in (source / name).rglob("*") if path.is_file())
    assert packed == {path.relative_to(source).as_posix() for path in files}
    assert (metadata.name, metadata.license_expression) == ("lowmem-gblm", "Apache-2.0")
    assert metadata.keywords
    assert metadata.project_urls
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
