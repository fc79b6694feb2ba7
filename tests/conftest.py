"""What all tests share: one thread, no network, tiny models and texts made once."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Tiny products gain nothing from threads, and lose a lot when the cores are busy. What tests start
# as processes of their own inherits this; it is read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

# The process that only gives tests to workers reads this file, too: it imports no torch for that.
import hypothesis

import lowmem_gblm
from support.pretend.jobs import PRETENDS

if PRETENDS in os.environ:
    # For tests that are run once more on the pretended device, which "auto" then means.
    from support.pretend import device as pretend

    pretend.install()

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights, real text and the authors' results, where they are at hand."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}: real weights and reference results")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets built from local files must not end in the home directory."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """What tests have imported stays: to look through it for garbage takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def known_speed() -> Iterator[None]:
    """Plans are those of one machine: to measure this one takes two seconds a plan.

    `unit/runtime/test_benchmark.py` measures it; so do commands in processes of their own.
    """
    names = ("probe_bytes", "flops_rate", "memory_rate", "read_rate", "write_rate")
    rates = {name: lambda *given, **options: 1e9 for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowmem_gblm.commands.estimate.benchmark", SimpleNamespace(**rates))
        yield


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """On a busy machine anything may take two seconds, and be announced.

    `unit/runtime/test_activity.py` is impatient.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowmem_gblm.runtime.activity._FIRST_S", 1e4)
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 4000 characters."""
    from support.tiny_models import sample_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file. Not to be modified."""
    from support.tiny_models import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models by architecture, each made once. Not to be modified."""
    from support.tiny_models import save_tiny

    made: dict[str, Path] = {}

    def model(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture) / "model"
            made[architecture] = save_tiny(architecture, folder)
        return made[architecture]

    return model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small blocks in one file. Not to be modified."""
    from support.tiny_models import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("small") / "model", blocks=2, width=16)


@pytest.fixture
def prune_in_place(text_file: Path) -> Callable[..., dict[str, Any]]:
    """Prunes a model in place, as one who has confirmed it."""

    def prune(model: Path, **options: Any) -> dict[str, Any]:
        confirmed = {"in_place": True, "overwrite_my_only_copy": True}
        asked = {"nsamples": 2, "seqlen": 16, "calibration": str(text_file)}
        return lowmem_gblm.prune(model, None, **asked | confirmed | options)

    return prune
