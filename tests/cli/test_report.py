"""`report`: its numbers are those of the files, its page shows them, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.report.page import GENERATOR
from support.tiny_models import save_tiny

INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
HOSTILE = '<script>alert("x")</script>&\'\x1b[2J'
VOID = {"meta", "link", "img", "br"}
SVG = {"path"}
METHODS = ("wanda", "magnitude", "sparsegpt")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., Path]:
    """A tiny model of an architecture, pruned by a method, made once. Not to be modified."""
    folder = tmp_path_factory.mktemp("outputs")

    def output(architecture: str, method: str, **options: Any) -> Path:
        name = "-".join([architecture, method, *map(str, options.values())]).replace(":", "of")
        if not (folder / architecture).exists():
            save_tiny(architecture, folder / architecture, blocks=2)
        if not (folder / name).exists():
            size = {"nsamples": 2, "seqlen": 32, "calibration": str(text_file)}
            size["max_shard_size"] = 1
            model = folder / architecture
            lowmem_gblm.prune(model, folder / name, method=method, **size, **options)
        return folder / name

    return output


@dataclass
class Page(HTMLParser):
    """A page that is read: its tags are closed in order, and these are its texts."""

    tables: list[list[list[str]]] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += " ".join(data.split())


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    return page


def masks(output: Path) -> dict[str, torch.Tensor]:
    """Zeros of all pruned matrices, [out, in] or [experts, out, in], read by safetensors."""
    described = json.loads((output / "pruning.json").read_text())["tensors"]
    stored = {}
    for shard in output.glob("*.safetensors"):
        stored |= load_file(shard)
    found: dict[str, list[torch.Tensor]] = {}
    for name, one in described.items():
        zero = (stored[name].mT if one["layout"] == "in,out" else stored[name]) == 0
        found.setdefault(re.sub(r"experts\.\d+", "experts.*", name), []).append(zero)
    return {
        name: zeros[0] if len(zeros) == 1 else torch.stack(zeros) for name, zeros in found.items()
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_counts_are_those_of_the_files(outputs, architecture: str) -> None:
    paths = [outputs(architecture, method) for method in METHODS]
    found = lowmem_gblm.report(paths[0], paths[1:])["outputs"]
    expected = [masks(path) for path in paths]
    for one, zeros in zip(found, expected, strict=True):
        assert {matrix["name"] for matrix in one["matrices"]} == set(zeros)
        assert one["total"]["zeros"] == sum(int(zero.sum()) for zero in zeros.values())
        for matrix in one["matrices"]:
            zero = zeros[matrix["name"]]
            assert (matrix["weights"], matrix["zeros"]) == (zero.numel(), int(zero.sum()))
            for along, dim in (("rows", -1), ("columns", -2)):
                counts = zero.sum(dim=dim).double()
                lines = matrix[along]
                assert lines["lines"] == counts.numel()
                assert lines["dead"] == int((counts == zero.shape[dim]).sum())
                if one["label"] != "sparsegpt" or along == "rows":
                    variance = (counts - counts.mean(dim=-1, keepdim=True)).square().mean()
                    assert lines["variance"] == pytest.approx(float(variance), abs=1e-9)
                assert (lines["dispersion"] is None) == (
                    one["label"] == "wanda" and along == "rows"
                )
        if zeros is not expected[0]:
            common = sum(int((expected[0][name] & zero).sum()) for name, zero in zeros.items())
            either = sum(int((expected[0][name] | zero).sum()) for name, zero in zeros.items())
            assert one["overlap"]["total"]["common"] == common
            assert one["overlap"]["total"]["jaccard"] == pytest.approx(common / either)
            assert one["overlap"]["total"]["share_by_chance"] == pytest.approx(0.25, abs=0.01)
    assert found[0]["overlap"] is None


def two_digits(value: float | None) -> str:
    return "fixed" if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def test_the_page_shows_the_numbers_of_the_json(outputs, tmp_path: Path, capsys) -> None:
    paths = [str(outputs("llama", method)) for method in METHODS]
    file = tmp_path / "report.html"
    argv = ["report", paths[0], "--against", *paths[1:], "--html", str(file), "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    page = read(file)
    text = " ".join(" ".join(page.texts).split())
    for sentence in found["headlines"]:
        assert sentence in text
    kinds = list(found["outputs"][0]["kinds"])
    columns, rows, *maps = page.tables[: 2 + len(paths)]
    for table, along in ((columns, "columns"), (rows, "rows")):
        assert table[0] == ["output", "all", *kinds]
        for one, line in zip(found["outputs"], table[1:], strict=True):
            expected = [one["total"], *one["kinds"].values()]
            shown = [two_digits(kind[along]["dispersion"]) for kind in expected]
            assert line == [one["label"], *shown]
    for one, table in zip(found["outputs"], maps, strict=True):
        for matrix in one["matrices"]:
            line = next(line for line in table if line[0] == str(matrix["block"]))
            shown = line[1 + kinds.index(matrix["kind"])]
            assert shown == two_digits(matrix["columns"]["dispersion"])
    zeros, overlaps, runs, *matrices = page.tables[2 + len(paths) :]
    assert {cell for line in zeros[1:] for cell in line[1:]} == {"50.0"}
    shared = found["outputs"][1]["overlap"]
    assert overlaps[1] == [
        "magnitude",
        "common zeros",
        *(f"{one['share']:.1%}" for one in [shared["total"], *shared["kinds"].values()]),
    ]
    assert overlaps[4][:2] == ["by chance", f"{shared['total']['jaccard_by_chance']:.3f}"]
    assert runs[0][1:] == [f"{one['label']}{one['output']}" for one in found["outputs"]]
    peak = found["outputs"][0]["run"]["memory"]["host_peak_bytes"]
    assert f"host {peak / 2**20:.1f} MiB, planned " in text
    for one, table in zip(found["outputs"], matrices, strict=True):
        for matrix, line in zip(one["matrices"], table[1:], strict=True):
            assert line[:2] == [matrix["name"], f"{matrix['sparsity']:.2%}"]
            assert line[3] == two_digits(matrix["columns"]["dispersion"])
            assert line[6] == two_digits(matrix["rows"]["dispersion"])


def test_the_page_needs_nothing_outside_of_it(outputs, tmp_path: Path) -> None:
    paths = [outputs("llama", method) for method in METHODS]
    lowmem_gblm.report(paths[0], paths[1:], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        if tag == "img":
            assert attributes["alt"]
    style = (tmp_path / "report.html").read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in style
    assert "prefers-color-scheme: dark" in style
    # Seven kinds of matrices, each by three methods.
    assert names.count("img") == 21
    assert names.count("table") == len(re.findall("<caption>", style)) + len(paths)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "2:5", "on_ragged": "keep"}])
def test_rows_of_a_pattern_are_called_fixed(outputs, tmp_path: Path, options) -> None:
    output = outputs("llama", "magnitude", **options)
    found = lowmem_gblm.report(output, html=tmp_path / "report.html")["outputs"][0]
    assert found["total"]["rows"]["dispersion"] is None
    assert found["total"]["columns"]["dispersion"] > 0
    assert read(tmp_path / "report.html").tables[1][1][1:] == ["fixed"] * 8


def rename(output: Path, old: str, new: str) -> None:
    """Renames a tensor of an output everywhere."""
    for shard in output.glob("*.safetensors"):
        tensors = load_file(shard)
        if old in tensors:
            renamed = {new if name == old else name: one for name, one in tensors.items()}
            save_file(renamed, shard, {"format": "pt"})
    for name, key in ((INDEX, "weight_map"), ("pruning.json", "tensors")):
        content = json.loads((output / name).read_text())
        content[key] = {new if one == old else one: what for one, what in content[key].items()}
        (output / name).write_text(json.dumps(content))


def test_names_from_files_are_only_text(outputs, tmp_path: Path, capsys) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    shutil.copytree(outputs("llama", "wanda"), folder)
    rename(folder, QUERY, f"model.layers.1.{HOSTILE}.weight")
    record = json.loads((folder / "pruning.json").read_text())
    record |= {"method": HOSTILE, "model": HOSTILE, "calibration": HOSTILE, "notes": [HOSTILE]}
    record["versions"][HOSTILE] = HOSTILE
    (folder / "pruning.json").write_text(json.dumps(record))
    (folder / "evaluation.json").write_text(
        json.dumps({"job": record["job"], "perplexity": 1.5, "text": HOSTILE})
    )
    assert main(["report", str(folder), "--html", str(tmp_path / "report.html")]) == 0
    page = read(tmp_path / "report.html")
    assert "script" not in [tag for tag, _ in page.tags]
    assert '<script>alert("x")' in "".join(page.texts)
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        assert "\x1b" not in text


def test_what_was_measured_of_the_output_is_shown(outputs, tmp_path: Path, text_file) -> None:
    paths = [Path(shutil.copytree(outputs("llama", name), tmp_path / name)) for name in METHODS[:2]]
    for path in paths:
        result = lowmem_gblm.evaluate(path, text=str(text_file), seqlen=32, windows=3)
        assert result["job"] == json.loads((path / "pruning.json").read_text())["job"]
        (path / "evaluation-short.json").write_text(json.dumps(result))
    other = json.loads((paths[1] / "evaluation-short.json").read_text())
    (paths[0] / "evaluation-other.json").write_text(json.dumps(other))
    dense = lowmem_gblm.evaluate(
        outputs("llama", "wanda").with_name("llama"), text=str(text_file), seqlen=32, windows=3
    )
    assert dense["job"] is None
    (paths[0] / "evaluation-dense.json").write_text(json.dumps(dense))
    (paths[0] / "evaluation-broken.json").write_text("[1]")
    found = lowmem_gblm.report(paths[0], paths[1:], tmp_path / "report.html")
    perplexity = found["outputs"][0]["evaluations"][0]["perplexity"]
    assert [len(one["evaluations"]) for one in found["outputs"]] == [1, 1]
    unused = [
        f"not used: {paths[0]}/evaluation-{name}.json" for name in ("broken", "dense", "other")
    ]
    notes = found["outputs"][0]["notes"]
    assert [note[: len(start)] for note, start in zip(notes, unused, strict=True)] == unused
    # A page is for others: it has no path of this machine.
    said = f"{text_file.name} (3 windows of 32 tokens)"
    assert found["headlines"][-1].startswith(f"Perplexity on {said}")
    text = "".join(read(tmp_path / "report.html").texts)
    assert f"{perplexity:.3f} on {said}" in text
    assert str(text_file.parent) not in text
    assert "does not name the job of this output" in text


def test_outputs_of_one_method_are_told_by_their_folders(outputs) -> None:
    paths = [outputs("llama", "wanda"), outputs("llama", "wanda", sparsity=0.6)]
    found = lowmem_gblm.report(paths[0], paths[1:])
    assert [one["label"] for one in found["outputs"]] == [path.name for path in paths]


def test_only_what_both_have_pruned_is_compared(outputs) -> None:
    first = outputs("llama", "wanda", exclude="*q_proj*")
    found = lowmem_gblm.report(first, [outputs("llama", "magnitude")])["outputs"]
    assert "q_proj" not in found[0]["kinds"]
    assert "q_proj" in found[1]["kinds"]
    assert list(found[1]["overlap"]["kinds"]) == list(found[0]["kinds"])


@pytest.fixture
def refused(capsys) -> Callable[..., None]:
    """Runs `report`, which fails with this code and says this on stderr."""

    def check(code: int, sentence: str, *argv: object) -> None:
        assert main(["report", *map(str, argv)]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert sentence in captured.err

    return check


def test_what_is_no_output_is_refused(outputs, refused, tmp_path: Path) -> None:
    dense = outputs("llama", "wanda").with_name("llama")
    refused(3, "has no pruning.json: it was not made by lowmem-gblm prune", dense)
    refused(3, "there is no model folder", tmp_path / "nowhere")
    refused(3, "there is no model folder", outputs("llama", "wanda"), "--against", tmp_path / "no")
    unfinished = Path(shutil.copytree(dense, tmp_path / "unfinished"))
    (unfinished / "PRUNING-IN-PLACE").write_text("Job 1\n")
    refused(5, "is being pruned in place, or was until that was interrupted", unfinished)


def test_outputs_of_other_models_are_refused(outputs, refused) -> None:
    first, other = outputs("llama", "wanda"), outputs("gpt2", "wanda")
    refused(2, f"{other} is of another model than {first}: lm_head", first, "--against", other)
    refused(
        2, f"{first} is named twice: give other outputs to --against", first, "--against", first
    )


def test_outputs_that_were_changed_are_refused(outputs, refused, tmp_path: Path) -> None:
    output = Path(shutil.copytree(outputs("llama", "wanda"), tmp_path / "out"))
    shard = output / json.loads((output / INDEX).read_text())["weight_map"][QUERY]
    tensors = load_file(shard)
    tensors[QUERY][0] = 1.0
    save_file(tensors, shard, {"format": "pt"})
    refused(7, f"{QUERY} in {output} has 1128 zeros, pruning.json says 1152", output)
    record = json.loads((output / "pruning.json").read_text())
    record["tensors"]["model.other"] = record["tensors"][QUERY]
    (output / "pruning.json").write_text(json.dumps(record))
    refused(3, "does not have the tensor model.other as its pruning.json describes it", output)


def test_other_weights_of_the_same_shapes_are_noted(
    outputs, tmp_path: Path, text_file: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", blocks=2, seed=1)
    lowmem_gblm.prune(model, tmp_path / "other", method="magnitude")
    first = outputs("llama", "wanda")
    found = lowmem_gblm.report(first, [tmp_path / "other"])["outputs"]
    note = f"pruned from other weights than {first}, of the same names and shapes"
    assert [one["notes"] for one in found] == [[], [note]]


def test_only_an_earlier_report_is_replaced(outputs, refused, tmp_path: Path) -> None:
    output, file = outputs("llama", "wanda"), tmp_path / "page.html"
    file.write_text("<p>of a user</p>")
    refused(5, f"{file} exists and is no report: choose another FILE", output, "--html", file)
    assert file.read_text() == "<p>of a user</p>"
    refused(5, "exists and is no report", output, "--html", tmp_path)
    refused(2, "there is no folder", output, "--html", tmp_path / "no" / "page.html")
    file.unlink()
    assert main(["report", str(output), "--html", str(file)]) == 0
    file.write_text(file.read_text() + "<!-- an earlier one -->")
    assert main(["report", str(output), "--html", str(file)]) == 0
    assert GENERATOR in file.read_text()
    assert "an earlier one" not in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_without_a_page_the_sentences_are_printed(outputs, capsys) -> None:
    output = outputs("llama", "wanda")
    assert main(["report", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == lowmem_gblm.report(output)["headlines"]
    assert lines[0].startswith("wanda ")
