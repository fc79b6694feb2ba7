"""Uploading an output: only what is proved, only what it is made of, and never over other weights.

The Hub is a stand-in: its client is never asked for anything over a network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import RequestError, UploadError, VerificationError
from support.tiny_models import save_tiny

REPO = "some-one/small-pruned"


@dataclass
class Hub:
    """Repositories by name, each with its files; `fails` is raised by the next upload."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    fails: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if repo_id not in self.repositories:
            self.repositories[repo_id] = {}
            self.private[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def list_repo_files(self, repo_id: str) -> list[str]:
        return [*self.repositories[repo_id], ".gitattributes"]

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: Iterable[str], commit_message: str
    ) -> Any:
        for path in sorted(folder_path.rglob("*")):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.repositories[repo_id][name] = path.read_bytes()
                if self.fails is not None:
                    raise self.fails
        return SimpleNamespace(oid="0123")


def as_strict(real: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """The stand-in of a method, which takes no other arguments than the real one."""

    def called(api: object, *args: Any, **options: Any) -> Any:
        signature(real).bind(api, *args, **options)
        return stand_in(*args, **options)

    return called


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, client = Hub(), huggingface_hub.HfApi
    for name in ("create_repo", "list_repo_files", "upload_folder"):
        method = as_strict(getattr(client, name), getattr(hub, name))
        monkeypatch.setattr(client, name, method)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_0123")
    return hub


@pytest.fixture(scope="module")
def pruned(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(shutil.copytree(small, tmp_path_factory.mktemp("source") / "model"))
    (source / "notes [1]").mkdir()
    (source / "notes [1]" / "a*b.txt").write_text("by hand")
    output = source.with_name("out")
    lowmem_gblm.prune(source, output, method="magnitude", max_shard_size=1)
    return output


@pytest.fixture
def output(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_the_output_is_made_of_is_uploaded_and_nothing_else(
    hub: Hub, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = files(output)
    for name in ("notes.txt", "notes [1]/ab.txt"):
        (output / name).write_text("mine")
    for name in ("pytorch_model.bin", "evaluation.json", ".cache/huggingface/a"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    mine = {"notes.txt": b"mine", "notes [1]/ab.txt": b"mine"}
    assert main(["upload", str(output), REPO]) == 0
    assert hub.repositories == {REPO: made | mine}
    assert hub.private == {REPO: True}
    told = capsys.readouterr()
    assert told.out == f"uploaded {len(made) + 2} files: https://huggingface.co/{REPO}\n"
    assert told.err.startswith("hashes ")


def test_a_model_pruned_in_place_leaves_its_other_weights_here(hub: Hub, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", blocks=2, width=16)
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    confirmed = {"in_place": True, "overwrite_my_only_copy": True}
    lowmem_gblm.prune(model, method="magnitude", **confirmed)
    result = lowmem_gblm.upload(model, REPO, public=True)
    expected = files(model).keys() - {"consolidated.safetensors"}
    assert hub.repositories[REPO].keys() == expected == set(result["files"])
    assert hub.private == {REPO: False}


def test_what_was_measured_is_in_the_card_that_is_uploaded(
    hub: Hub, output: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"text": str(text_file), "windows": 2, "seqlen": 16}
    measured = lowmem_gblm.evaluate(output, **asked)
    (output / "evaluation.json").write_text(json.dumps(measured))
    lowmem_gblm.upload(output, REPO)
    card = hub.repositories[REPO]["README.md"].decode()
    row = f"| Perplexity | {measured['perplexity']:.3f} on text.txt (2 windows of 16 tokens) |"
    assert row in card
    mine = "---\nlicense: mit\n---\nWritten by hand.\n"
    (output / "README.md").write_text(mine)
    lowmem_gblm.upload(output, REPO)
    assert hub.repositories[REPO]["README.md"].decode() == mine


def test_an_output_that_breaks_its_promises_is_not_uploaded(
    hub: Hub, output: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(small, output.with_name("source")))
    (source / "notes [1]").mkdir()
    (source / "notes [1]" / "a*b.txt").write_text("other")
    with pytest.raises(VerificationError, match="txt is not that of the source"):
        lowmem_gblm.upload(output, REPO, against=source)
    shard = next(output.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["upload", str(output), REPO]) == 7
    assert f"{shard.name} has the SHA-256" in capsys.readouterr().err
    assert hub.repositories == {}


def test_weights_of_another_model_are_not_mixed_with_those_of_the_output(
    hub: Hub, output: Path
) -> None:
    hub.repositories[REPO] = {"model.safetensors": b"other", "README.md": b"other"}
    with pytest.raises(UploadError, match="has weights that are not of this output: model"):
        lowmem_gblm.upload(output, REPO)
    assert hub.repositories[REPO]["README.md"] == b"other"


def test_an_upload_that_fails_is_resumed(
    hub: Hub, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (
        HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None)),
        ConnectionError("offline"),
        RuntimeError("a broken connection"),
    ):
        hub.fails = error
        assert main(["upload", str(output), REPO]) == 2
        said = f"the upload to {REPO} has failed: {error}. The same command resumes it, and sends"
        assert said in capsys.readouterr().err
    hub.fails = None
    lowmem_gblm.upload(output, REPO)
    assert hub.repositories[REPO] == files(output)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"repo": "a/b/c"}, r"a/b/c is no name of a repository: Repo id must "),
        ({"output": "nowhere"}, r"there is no folder nowhere to upload: give one that prune has "),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, Any], sentence: str, hub: Hub, output: Path
) -> None:
    with pytest.raises(RequestError, match=sentence):
        lowmem_gblm.upload(**{"output": output, "repo": REPO} | change)
    assert hub.repositories == {}


def test_a_missing_token_is_told_before_anything_is_read(
    hub: Hub,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["upload", str(output), REPO]) == 2
    said = "uploading needs a token of the Hub that may write: hf auth login stores one, or set HF_"
    told = capsys.readouterr()
    assert said in told.err
    assert "hashes" not in told.err
