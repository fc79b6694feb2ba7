"""Sparsities and patterns by glob: each tensor is pruned as in a run that prunes all of them so."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lowmem_gblm
from lowmem_gblm.commands.prune.resume import find_job
from lowmem_gblm.errors import CheckpointError, JobError, RequestError, VerificationError
from support.crashes import content, stopped_at
from support.tiny_models import save_tiny

Prune = Callable[..., Path]
DENSE = {"activations": "dense"}
BY_GLOB = {
    "pattern": {"*.q_proj.*": "2:4"},
    "sparsity": {"*.down_proj.*": 0.7, "*.mlp.*": "0.3"},
}
# The same: what a run with one value for all tensors is asked for; None where all stay dense.
ASKED: dict[str, dict[str, Any] | None] = {
    "*.q_proj.*": {"pattern": "2:4"},
    "*.down_proj.*": {"sparsity": "0.7"},
    "*.mlp.*": {"sparsity": "0.3"},
    "*": None,
}
# Globs of which both match some tensors.
ONE_ORDER = {"*.mlp.*": 0.6, "*.layers.1.*": 0.3}
OTHER_ORDER = dict(reversed(ONE_ORDER.items()))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()
    }


@pytest.fixture
def prune(small: Path, text_file: Path, tmp_path: Path) -> Prune:
    """Prunes the small model, or another one, into a folder of this name; returns the folder."""

    def prune(output: str | Path, model: Path = small, **options: Any) -> Path:
        asked = {"nsamples": 2, "seqlen": 16, "calibration": str(text_file)}
        lowmem_gblm.prune(model, tmp_path / output, **asked | options)
        return tmp_path / output

    return prune


@pytest.mark.parametrize("method", ["magnitude", "gblm", "sparsegpt"])
def test_each_tensor_is_that_of_a_run_with_its_value(
    method: str, prune: Prune, small: Path
) -> None:
    output = prune("out", method=method, **DENSE | BY_GLOB)
    lowmem_gblm.verify(output, small)
    runs = {
        glob: small if asked is None else prune(str(number), method=method, **DENSE | asked)
        for number, (glob, asked) in enumerate(ASKED.items())
    }
    expected = {glob: tensors(folder) for glob, folder in runs.items()}
    for name, tensor in tensors(output).items():
        glob = next(glob for glob in ASKED if fnmatchcase(name, glob))
        assert torch.equal(tensor, expected[glob][name]), name


def test_a_block_sees_the_blocks_before_it_as_they_are_pruned(prune: Prune) -> None:
    first = prune("first", method="wanda", sparsity=0.6, include="*.layers.0.*")
    second = prune("second", first, method="wanda", sparsity=0.3, include="*.layers.1.*")
    found = prune("out", method="wanda", sparsity={"*.layers.0.*": 0.6, "*": 0.3})
    assert all(torch.equal(one, tensors(second)[name]) for name, one in tensors(found).items())


@pytest.mark.parametrize(("architecture", "glob"), [("mixtral", "*.w2.*"), ("gpt2", "*.c_fc.*")])
def test_experts_and_transposed_matrices(
    architecture: str, glob: str, prune: Prune, tmp_path: Path
) -> None:
    model = save_tiny(architecture, tmp_path / "model", blocks=2, width=16)
    output = prune("out", model, method="sparsegpt", sparsity={glob: 0.75, "*": 0.25})
    lowmem_gblm.verify(output, model)
    for name in json.loads((output / "pruning.json").read_text())["tensors"]:
        zeros = (tensors(output)[name] == 0).double().mean().item()
        assert zeros == (0.75 if fnmatchcase(name, glob) else 0.25), name


def test_saved_statistics_serve_any_sparsity(prune: Prune, tmp_path: Path) -> None:
    measured = prune("measured", **DENSE | BY_GLOB)
    saved = tmp_path / "statistics"
    prune("saving", save_statistics=saved, **DENSE)
    taken = prune("taken", statistics=saved, **DENSE | BY_GLOB)
    assert content(taken) == content(measured)
    recipes = [
        json.loads((one / "pruning.json").read_text())["recipe"] for one in (taken, measured)
    ]
    assert recipes[0] == recipes[1]


def test_globs_in_another_order_are_another_job(prune: Prune, tmp_path: Path) -> None:
    expected = content(prune("expected", sparsity=ONE_ORDER))
    assert content(prune("other", sparsity=OTHER_ORDER)) != expected
    stopped_at(prune, tmp_path / "out", "prune", 1, sparsity=ONE_ORDER)
    with pytest.raises(JobError, match=r"sparsity: {'\*.mlp.\*': 0.6, .*}, now {'\*.layers.1.\*'"):
        prune("out", sparsity=OTHER_ORDER)
    resumed = find_job(tmp_path / "out.work")
    assert list(resumed.sparsity) == list(ONE_ORDER)
    assert content(prune("out", sparsity=ONE_ORDER)) == expected


def test_one_glob_for_all_tensors_is_no_other_job(prune: Prune, tmp_path: Path) -> None:
    stopped_at(prune, tmp_path / "out", "prune", 1, sparsity=0.5)
    record = json.loads((prune("out", sparsity={"*": 0.5}) / "pruning.json").read_text())
    assert (record["sparsity"], record["pattern"], record["attempts"]) == (0.5, "unstructured", 2)


def test_the_record_promises_a_pattern_by_glob(prune: Prune) -> None:
    output = prune("out", method="magnitude", **BY_GLOB)
    path = output / "pruning.json"
    record = json.loads(path.read_text())
    assert record["sparsity"] == {"*.q_proj.*": 0.5, "*.down_proj.*": 0.7, "*.mlp.*": 0.3}
    assert list(record["pattern"].values()) == ["2:4", "unstructured", "unstructured"]

    def tamper(**changes: Any) -> None:
        path.write_text(json.dumps(record | changes))

    tamper(sparsity=record["sparsity"] | {"*.mlp.*": 0.4})
    with pytest.raises(VerificationError, match=r"gate_proj.* is not the pattern unstructured at "):
        lowmem_gblm.verify(output)
    tamper(
        sparsity={"*.q_proj.*": 0.5, "*.mlp.*": 0.3},
        pattern={"*.q_proj.*": "2:4", "*.mlp.*": "unstructured"},
    )
    with pytest.raises(VerificationError, match=r"down_proj.* is not the pattern"):
        lowmem_gblm.verify(output)
    tamper(sparsity={"*.q_proj.*": 0.5}, pattern={"*.q_proj.*": "2:4"})
    with pytest.raises(VerificationError, match=r"is pruned, and pruning.json has no sparsity for"):
        lowmem_gblm.verify(output)
    tamper(sparsity=dict(reversed(record["sparsity"].items())))
    with pytest.raises(CheckpointError, match="sparsity and pattern have other globs"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": {}}, "--sparsity by glob takes globs over tensor names, each with its spar"),
        ({"pattern": {3: "2:4"}}, "--pattern by glob takes globs over tensor names, each with"),
        ({"sparsity": {"*": 1}}, "the sparsity must lie between 0 and 1, both excluded; got 1"),
        ({"pattern": {"*": "unstructured"}}, 'must read "N:M", as in 2:4 .*; got \'unstructured'),
        ({"pattern": {"*": (2, 4, 8)}}, 'the pattern must read "N:M"'),
        (
            {"sparsity": {"*.mpl.*": 0.6, "*": 0.3}},
            r"--sparsity '\*.mpl.\*' matches no tensor that can be pruned, the nearest .*mlp",
        ),
        (
            {"sparsity": {"*": 0.3, "*.mlp.*": 0.6}},
            r"the glob '\*.mlp.\*' of --sparsity decides for no tensor: .* Put it before them",
        ),
        ({"pattern": "2:4", "sparsity": {"*": 0.5}}, r"the glob '\*' of --sparsity decides for no"),
        (
            {"sparsity": {"*.mlp.*": 0.6}, "exclude": "*.mlp.*"},
            "--include, --exclude and the globs of --sparsity leave nothing to prune",
        ),
        ({"pattern": {"*.mlp.*": "2:5"}}, "which 5 does not divide"),
    ],
)
def test_globs_without_effect_and_wrong_values_are_refused(
    options: dict[str, Any], sentence: str, prune: Prune, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=sentence):
        prune("out", method="magnitude", **options)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_what_no_glob_matches_stays_dense_and_a_note_says_so(prune: Prune, small: Path) -> None:
    output = prune("out", method="magnitude", pattern={"*.mlp.*": "2:4"})
    record = json.loads((output / "pruning.json").read_text())
    assert all(".mlp." in name for name in record["tensors"])
    assert any("matrices inside decoder blocks" in note for note in record["notes"])
    dense = tensors(small)
    for name, tensor in tensors(output).items():
        assert torch.equal(tensor, dense[name]) == (".mlp." not in name)


def test_a_comparison_has_one_value_for_all_tensors(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a comparison has one sparsity or pattern for all"):
        lowmem_gblm.compare(small, ["wanda"], tmp_path / "out", sparsity=[0.5, {"*": 0.6}])
