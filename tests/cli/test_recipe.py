"""Recipes: what a file may say, who wins, what is refused; an output's recipe makes it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands import recipe
from lowmem_gblm.commands.recipe import read_recipe, with_recipe
from lowmem_gblm.commands.request import PruneRequest, prune_request
from lowmem_gblm.errors import RequestError
from lowmem_gblm.options import options
from support.crashes import content

YAML = """
# Comments, quotes and both styles of YAML.
method: gblm
alpha: 1e1
gradient_norm: l2
pattern: {"*.q_proj.*": 2:4}
sparsity:
  "*.mlp.*": 0.6
  '*': .30
nsamples: 3
bos: never
exclude: ["*.layers.0.*", "*.v_proj.*"]
"""
SIZE = {"nsamples": 2, "seqlen": 16}
RUNS: list[dict[str, Any]] = [
    {"method": "magnitude", "sparsity": 0.29},
    {"method": "gblm", "alpha": 3, "gradient_norm": "l2", "seed": 5},
    {"method": "sparsegpt", "pattern": {"*.mlp.*": "2:5"}, "sparsity": 0.3, "on_ragged": "keep"},
    {"method": "gradient", "pattern": "1:4", "dtype": "bfloat16", "include": "*.mlp.*"},
    {
        "method": "wanda",
        "sparsity": {"*.layers.1.*": 0.25, "*.mlp.*": "0.6"},
        "activations": "dense",
        "bos": "always",
        "exclude": ["*.up_proj.*"],
    },
]


@pytest.fixture
def written(tmp_path: Path):
    """Writes a recipe; returns its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "pruning.json").read_text())


@pytest.mark.parametrize("asked", RUNS, ids=lambda asked: asked["method"])
def test_the_recipe_of_an_output_makes_it_again(
    asked: dict[str, Any],
    small: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lowmem_gblm.prune(small, tmp_path / "out", calibration=str(text_file), **SIZE | asked)
    record = record_of(tmp_path / "out")
    assert record["recipe"]["calibration"] == text_file.name
    assert "/" not in json.dumps(record["recipe"])
    monkeypatch.chdir(text_file.parent)
    lowmem_gblm.prune(small, tmp_path / "again", recipe=tmp_path / "out" / "pruning.json")
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert record_of(tmp_path / "again")["recipe"] == record["recipe"]


def test_a_recipe_says_what_is_typed_otherwise(written) -> None:
    found = prune_request("model", **with_recipe(written(YAML), {}))
    expected = PruneRequest(
        model="model",
        method="gblm",
        method_options={"alpha": 10.0, "gradient_norm": "l2"},
        pattern={"*.q_proj.*": "2:4"},
        sparsity={"*.mlp.*": "0.6", "*": ".30"},
        nsamples=3,
        bos="never",
        exclude=("*.layers.0.*", "*.v_proj.*"),
    )
    assert found == expected
    assert with_recipe(None, {"seed": 1}) == {"seed": 1}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"nsamples": 128, "sparsity": None}, {"nsamples": 128}),
        ({"sparsity": "0.5"}, {"sparsity": "0.5", "pattern": None}),
        ({"pattern": "2:4"}, {"sparsity": None, "pattern": "2:4"}),
        ({"exclude": ["*.1.*"]}, {"exclude": ["*.1.*"]}),
        ({"method": "gradient"}, {"method": "gradient", "alpha": None, "gradient_norm": "l2"}),
        ({"method": "wanda"}, {"method": "wanda", "alpha": None, "gradient_norm": None}),
    ],
)
def test_what_is_given_wins(given: dict[str, Any], left: dict[str, Any], written) -> None:
    path = written(YAML)
    found = with_recipe(path, given)
    assert {
        name: value for name, value in left.items() if value is not None
    }.items() <= found.items()
    assert not {name for name, value in left.items() if value is None} & found.keys()
    untouched = read_recipe(path).keys() - left.keys()
    assert {name: found[name] for name in untouched} == {
        name: read_recipe(path)[name] for name in untouched
    }
    prune_request("model", **found)


def test_the_command_line_wins_with_a_default_too(
    small: Path, written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written("method: magnitude\npattern: 2:4\nseed: 3\nseqlen: 16\nactivations: dense")
    typed = ["--seed", "0", "--sparsity", "0.5", "--activations", "pruned"]
    assert main(["prune", str(small), str(tmp_path / "out"), "--recipe", str(path), *typed]) == 0
    record = record_of(tmp_path / "out")
    names = ("method", "sparsity", "pattern", "seed", "seqlen", "activations")
    found = [record[name] for name in names]
    assert found == ["magnitude", 0.5, "unstructured", 0, 16, "pruned"]
    # In Python, what is given as its default is left to the recipe.
    given = {"seed": 4, "activations": "pruned"}
    record = lowmem_gblm.prune(small, tmp_path / "again", recipe=path, **given)
    assert [record[name] for name in names] == ["magnitude", 0.5, "2:4", 4, 16, "dense"]
    capsys.readouterr()
    assert main(["plan", str(small), "--recipe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == ["prune"]


def test_a_nesting_too_deep_for_python_is_refused(written, monkeypatch: pytest.MonkeyPatch) -> None:
    def deep(*_: object) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(yaml, "compose", deep)
    with pytest.raises(RequestError, match="cannot be read: maximum recursion depth"):
        with_recipe(written("[[[]]]"), {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nsample: 3", "recipe.yaml: a recipe has no key nsample; the nearest is nsamples"),
        ("gradient-norm: l2", "has no key gradient-norm; the nearest is gradient_norm"),
        ("method: wanda\nalpha: 3", r"yaml: --alpha is no option of wanda: it belongs to gblm"),
        ("cpu_memory: 3GiB", "cpu_memory is for the command line, as --cpu-memory: a recipe says"),
        ("trust_remote_code: true", "trust_remote_code is for the command line, as --trust-remote"),
        ("nsamples: many", "recipe.yaml: nsamples must be an integer; got 'many'"),
        ("nsamples: 1.5", "nsamples must be an integer; got '1.5'"),
        ("alpha: much", "--alpha must be auto or a number from 0 on; got much"),
        ("nsamples: 0", "--nsamples must be at least 1; got 0"),
        ("activations: sparse", "--activations must be one of pruned, dense; got 'sparse'"),
        ("method: obs", "unknown method 'obs': choose one of gblm"),
        ("method: [wanda]", r"method cannot be \['wanda'\]: give one value, or leave out the key"),
        ("calibration:", "calibration cannot be '': give one value, or leave out the key"),
        ("seed: {a: 1}", "seed cannot be {'a': '1'}: give one value"),
        ("include: [[a]]", r"include cannot be \['a'\]: give one value"),
        ('sparsity: {"*": [0.5]}', r"sparsity cannot be \['0.5'\]: give one value"),
        ("sparsity: {}", "--sparsity by glob takes globs over tensor names"),
        ("sparsity: half", "the sparsity must be a number such as 0.5; got 'half'"),
        ("sparsity:\n  *.mlp.*: 0.6", r'cannot be read: .*line 2.* need quotes in YAML, as "\*.ml'),
        ("seed: &a 1\nnsamples: *a", "cannot be read: it has an alias. Globs need quotes"),
        ("seed: 1\nseed: 2", "cannot be read: it has the key seed twice"),
        ('sparsity: {"*": 0.5, "*": 0.6}', r"it has the key \* twice"),
        ("? [seed]\n: 1", "a recipe has no key .*ScalarNode"),
        ("seed: 1\n---\nseed: 2", "cannot be read: expected a single document"),
        ("- seed", "recipe.yaml must hold options, as sparsity: 0.5"),
        ("", "recipe.yaml must hold options"),
        ("#" * 70000, "has more than 65536 bytes, which is too long for a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, sentence: str, written) -> None:
    with pytest.raises(RequestError, match=sentence):
        prune_request("model", **with_recipe(written(text), {}))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seed": null}', "seed cannot be None: give one value, or leave out the key"),
        ('{"seed": true}', "seed must be an integer; got True"),
        ('{"seed": 1, "seed": 2}', "cannot be read: a name occurs twice: seed"),
        ('{"tensors": {}}', "is the record of a version of lowmem-gblm without recipes"),
        ('{"tensors": {}, "recipe": 3}', "must hold options, as sparsity: 0.5"),
    ],
)
def test_json_that_is_no_recipe_is_refused(text: str, sentence: str, written) -> None:
    with pytest.raises(RequestError, match=sentence):
        read_recipe(written(text, "pruning.json"))


def test_a_recipe_that_cannot_be_read_is_a_bad_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "demo", "--recipe", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("recipe.yaml", "in_place: true\ndisk: 5GB", {"in_place": True, "disk": 5_000_000_000}),
        ("recipe.json", '{"in_place": false, "disk": 5}', {"in_place": False, "disk": 5}),
        ("recipe.yaml", "in_place: 1", "in_place must be true or false; got '1'"),
        ("recipe.yaml", "disk: 5", "a size needs a unit"),
    ],
)
def test_flags_and_sizes(
    name: str,
    text: str,
    expected: dict[str, Any] | str,
    written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No option of a recipe is one as yet; those of another package's method may be."""
    for one in options(PruneRequest):
        monkeypatch.setitem(recipe.KEYS, one.name, one)
    if isinstance(expected, dict):
        assert read_recipe(written(text, name)) == expected
    else:
        with pytest.raises(RequestError, match=expected):
            read_recipe(written(text, name))
