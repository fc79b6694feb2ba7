"""The card of an output: what the Hub reads, what a person reads, and what stays unsaid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.card import licence_of
from lowmem_gblm.storage.hub import public_name
from support.crashes import content

FAST = {"method": "magnitude", "sparsity": 0.5}
BASE = """---
license: llama2
license_name: the Llama licence
license_link: https://example.org/licence
language: en
---
# The base
"""
LICENCE = {
    "license": "llama2",
    "license_name": "the Llama licence",
    "license_link": "https://example.org/licence",
}


def pruned(model: Path, output: Path, **options: Any) -> ModelCard:
    lowmem_gblm.prune(model, output, **FAST | options)
    card = ModelCard.load(output / "README.md")
    assert metadata_load(output / "README.md") == card.data.to_dict()
    return card


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A model whose folder is that of a download into a cache of the Hub."""
    folder = tmp_path / "hub" / "models--some-one--Small-1B" / "snapshots" / "0123"
    return Path(shutil.copytree(small, folder))


def test_the_hub_reads_what_it_is_and_where_it_is_from(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    (model / "README.md").write_text(BASE)
    options = {"method": "wanda", "pattern": "2:4", "sparsity": None}
    options |= {"calibration": str(text_file), "nsamples": 2, "seqlen": 16}
    card = pruned(model, tmp_path / "out", **options)
    assert card.data.to_dict() == {
        "base_model": "some-one/Small-1B",
        "library_name": "transformers",
        **LICENCE,
        "tags": ["pruned", "sparse", "wanda", "2:4", "lowmem-gblm"],
    }
    assert (tmp_path / "out" / "README.base.md").read_text() == BASE
    assert (
        "lowmem-gblm prune some-one/Small-1B OUTPUT --method wanda --pattern 2:4 --dtype float32 "
        f"--bos never --calibration {text_file.name} --nsamples 2 --seqlen 16\n"
    ) in card.text
    assert "| Calibration | 2 × 16 tokens of text.txt<br>seed 0 |" in card.text
    assert "50.00% of the weights of 14 matrices of some-one/Small-1B are zero." in card.text


@pytest.mark.parametrize(
    ("method", "name", "datasets"),
    [
        ("wanda", "c4", ["allenai/c4"]),
        ("wanda", "wikitext2", ["Salesforce/wikitext"]),
        ("magnitude", "c4", None),
    ],
)
def test_the_data_set_of_the_samples_is_named(
    method: str,
    name: str,
    datasets: list[str] | None,
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lowmem_gblm.commands.prune import scope

    opened = scope.open_source
    monkeypatch.setattr(scope, "open_source", lambda name, *more: opened(str(text_file), *more))
    options = {"calibration": name, "nsamples": 1, "seqlen": 8}
    assert pruned(model, tmp_path / "out", method=method, **options).data.datasets == datasets


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, {}),
        ({"README.md": "# No front matter\nlicense: mit\n"}, {}),
        ({"README.md": "---\ntags: []\n---\nlicense: mit\n"}, {}),
        ({"README.md": BASE, "LICENSE": ""}, LICENCE),
        ({"README.md": "---\r\nlicense: 'mit'  # as it is\r\n---\r\n"}, {"license": "mit"}),
        ({"README.md": "---\nlicense: [mit]\n---\n"}, {}),
        ({"README.md": "---\nlicense: 'mit\n---\n"}, {}),
        ({"README.md": f"---\nlicense: {'[' * 200}\n---\n"}, {}),
        ({"README.md": f"---\nlicense: {'m' * 201}\n---\n"}, {}),
        ({"README.md": f"---\na: {'[' * 100000}\nlicense: mit\n---\n"}, {}),
        (
            {"README.md": "---\ntags: []\n---\n", "LICENSE.txt": "Do as you like."},
            {
                "license": "other",
                "license_name": "license-of-the-base-model",
                "license_link": "LICENSE.txt",
            },
        ),
    ],
)
def test_the_licence_is_that_of_the_model(
    files: dict[str, str], licence: dict[str, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, newline="")
    assert licence_of(tmp_path) == licence


@pytest.mark.parametrize("place", ["output", "in place"])
def test_no_path_of_the_machine_is_in_the_output(
    place: str, small: Path, text_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(small, tmp_path / "a model"))
    asked: dict[str, Any] = {"calibration": str(text_file), "nsamples": 1, "seqlen": 8}
    asked |= {"method": "gradient"}
    saved = tmp_path / "saved"
    lowmem_gblm.prune(model, tmp_path / "first", save_statistics=saved, **asked)
    asked |= {"statistics": saved}
    if place == "output":
        output = tmp_path / "out"
        record = lowmem_gblm.prune(model, output, work_dir=tmp_path, **asked)
    else:
        output = model
        record = lowmem_gblm.prune(model, in_place=True, overwrite_my_only_copy=True, **asked)
    for folder in (output, tmp_path / "first"):
        for name in ("pruning.json", "README.md"):
            text = (folder / name).read_text()
            assert str(tmp_path) not in text, name
            assert str(text_file.parent) not in text, name
    assert (record["model"], record["calibration"]) == ("a model", "text.txt")
    assert record["statistics"]["taken_from"] == "saved"
    card = ModelCard.load(output / "README.md")
    assert "lowmem-gblm prune 'a model' OUTPUT --method gradient" in card.text
    assert card.data.base_model is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("/gone/away/model", "model"),
        ("texts/../model", "model"),
        ("demo", "demo"),
    ],
)
def test_a_model_is_called_by_its_hub_id_or_its_folder(model: str, name: str) -> None:
    assert public_name(model) == name


def test_folders_are_called_as_they_were_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--org--name" / "snapshots" / "1"
    cached.mkdir(parents=True)
    (tmp_path / "link").symlink_to(cached)
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "plain")
    monkeypatch.chdir(tmp_path / "plain")
    names = {path: public_name(path) for path in (".", "../other", "../plain/", "../link")}
    assert names == {".": "plain", "../other": "other", "../plain/": "plain", "../link": "org/name"}


def test_a_pruned_model_that_is_pruned_again_has_no_base_on_the_hub(
    model: Path, tmp_path: Path
) -> None:
    """The name of a folder would be a link to a model of that name, or to none."""
    (model / "README.md").write_text(BASE)
    first = pruned(model, tmp_path / "first")
    second = pruned(tmp_path / "first", tmp_path / "second", sparsity=0.75)
    assert second.data.base_model is None
    assert "# first, pruned by " in second.content
    assert second.data.license == "llama2"
    assert (tmp_path / "second" / "README.base.md").read_text() == first.content
    lowmem_gblm.verify(tmp_path / "second", tmp_path / "first")


def test_in_place_the_card_of_the_model_is_kept(model: Path) -> None:
    (model / "README.md").write_text(BASE)
    confirmed = {"in_place": True, "overwrite_my_only_copy": True, "in_place_shared": True}
    lowmem_gblm.prune(model, **confirmed, **FAST)
    assert (model / "README.base.md").read_text() == BASE
    card = ModelCard.load(model / "README.md")
    assert (card.data.base_model, card.data.license) == ("some-one/Small-1B", "llama2")


def test_a_comparison_shows_its_results_in_the_cards(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "compared"
    command = ["compare", str(model), "--methods", "magnitude", "--output", str(folder)]
    asked = [*command, "--text", str(text_file), "--windows", "3", "--seqlen", "16", "--json"]
    assert main(asked) == 0
    row = json.loads(capsys.readouterr().out)["rows"][1]
    text = (folder / "magnitude" / "README.md").read_text()
    measured = f"{row['perplexity']:.3f} on text.txt (3 windows of 16 tokens)"
    assert f"<!-- results -->\n| | |\n|---|---|\n| Perplexity | {measured} |\n<!-- end" in text
    pruned(model, tmp_path / "alone", seqlen=16)
    alone = (tmp_path / "alone" / "README.md").read_text()
    assert alone.partition("## Results")[0] == text.partition("## Results")[0]
    assert content(folder / "magnitude").keys() == content(tmp_path / "alone").keys()
