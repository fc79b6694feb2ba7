"""Python code that comes with a checkpoint: refused, or run because the person said so."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import CheckpointError, JobError, UnsupportedModel
from lowmem_gblm.storage import hub
from support import reference
from support.crashes import content, stopped_at
from support.tiny_models import save_tiny

CONFIGURATION = """
import os
from pathlib import Path
from transformers import LlamaConfig

Path(os.environ["WITNESS"]).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"

    def __init__(self, twist=1.0, **kwargs):
        super().__init__(**kwargs)
        self.twist = twist
"""
MODEL = """
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_own import OwnConfig


class OwnMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.twist = config.twist

    def forward(self, hidden):
        gate = nn.functional.relu(self.gate_proj(hidden)) * self.twist
        return self.down_proj(gate * self.up_proj(hidden))


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)
        self.post_init()
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **kwargs):
        return super().__call__(text.lower(), **kwargs)
"""
OWN_MODEL = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
OWN_TOKENIZER = {
    "tokenizer_class": "OwnTokenizer",
    "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
}
SIZE = {"nsamples": 3, "seqlen": 32}

Prune = Callable[..., dict]


@pytest.fixture(scope="module", autouse=True)
def modules_of_strangers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that transformers copies must not end in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(autouse=True)
def nothing_imported() -> None:
    """The code of no earlier test counts as imported: tests come in any order, in any process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Is there once the code of the model has run."""
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    return tmp_path / "witness"


@pytest.fixture
def model(tmp_path: Path, witness: Path) -> Path:
    """A model of two blocks whose feed-forward layers are its own."""
    folder = save_tiny("llama", tmp_path / "model", blocks=2)
    edit(folder / "config.json", model_type="own", twist=0.7, auto_map=OWN_MODEL)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    edit(folder / "tokenizer_config.json", **OWN_TOKENIZER)
    (folder / "tokenization_own.py").write_text(TOKENIZER)
    return folder


@pytest.fixture
def prune(model: Path, text_file: Path) -> Prune:
    def prune(output: Path, **options: object) -> dict:
        options = {"trust_remote_code": True, "method": "gblm", **SIZE, **options}
        return lowmem_gblm.prune(model, output, calibration=str(text_file), **options)

    return prune


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_does_not_run_unless_it_is_trusted(prune, model, witness, tmp_path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        prune(tmp_path / "out", trust_remote_code=False)
    assert str(caught.value) == (
        f"{model}/config.json asks for Python code that comes with the checkpoint, which could do "
        f"whatever you can: read it and, if you trust it, add --trust-remote-code; or, if "
        f"transformers can do without it, take auto_map out of config.json"
    )
    assert not witness.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_code_that_is_trusted_computes_the_statistics(
    prune, model, witness, text_file, tmp_path
) -> None:
    record = prune(tmp_path / "out")
    assert witness.exists()
    assert record["trust_remote_code"] is True
    in_memory = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    assert type(in_memory).__name__ == "OwnForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    tokens = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    samples = reference.text_windows(tokens, SIZE["nsamples"], SIZE["seqlen"], 0)
    reference.prune(in_memory, samples, method="gblm", sparsity="0.5")
    written: dict[str, torch.Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(shard)
    for matrix in reference.prunable(in_memory):
        assert torch.equal(written[matrix.name], matrix.view()), matrix.name


def test_the_code_is_part_of_the_output(prune, tmp_path, text_file) -> None:
    prune(tmp_path / "out", method="wanda")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"configuration_own.py", "modeling_own.py", "tokenization_own.py"} <= names
    with pytest.raises(UnsupportedModel, match="add --trust-remote-code"):
        lowmem_gblm.evaluate(tmp_path / "out", text=str(text_file), seqlen=32, windows=2)
    found = lowmem_gblm.evaluate(
        tmp_path / "out", text=str(text_file), seqlen=32, windows=2, trust_remote_code=True
    )
    assert found["windows"] == 2
    assert lowmem_gblm.verify(tmp_path / "out", tmp_path / "model")["pruned_tensors"] == 14


def test_a_tokenizer_of_its_own_needs_trust_too(prune, model, witness, tmp_path) -> None:
    edit(model / "config.json", model_type="llama")
    content = json.loads((model / "config.json").read_text())
    del content["auto_map"]
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel) as caught:
        prune(tmp_path / "out", trust_remote_code=False)
    assert f"{model}/tokenizer_config.json asks for Python code that comes" in str(caught.value)
    assert prune(tmp_path / "out")["nsamples"] == 3


def test_a_plan_needs_no_weights_but_trust(model, witness) -> None:
    os.unlink(model / "model.safetensors")
    options = {"calibration": "demo", "method": "wanda", **SIZE}
    with pytest.raises(UnsupportedModel, match="add --trust-remote-code"):
        lowmem_gblm.plan(model, **options)
    assert not witness.exists()
    assert lowmem_gblm.plan(model, trust_remote_code=True, **options)["flops"] > 0


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("modeling_own.py", MODEL.replace("relu", "gelu")),
        ("config.json", None),
    ],
)
def test_a_job_is_not_gone_on_with_by_other_code(
    file, changed, prune, model, witness, tmp_path
) -> None:
    stopped_at(prune, tmp_path / "out", "reverse", 1)
    before = (model / file).read_text()
    if changed is None:
        edit(model / file, twist=0.8)
    else:
        (model / file).write_text(changed)
    with pytest.raises(JobError, match=r"was begun otherwise \(source_config: \w{8}…, now \w{8}…"):
        prune(tmp_path / "out")
    (model / file).write_text(before)
    prune(tmp_path / "out")
    prune(tmp_path / "again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "someone/else--modeling_own.OwnForCausalLM",
            "MODEL/config.json takes its code from 'someone/else--modeling_own.OwnForCausalLM', "
            "expected FILE.CLASS with a file of the folder: copy the code into MODEL and name it "
            "so",
        ),
        ("/etc/own.Own", "MODEL/config.json takes its code from '/etc/own.Own', expected FILE.CLA"),
        ("Own", "MODEL/config.json takes its code from 'Own', expected FILE.CLASS with a file of "),
        ("lost.Own", "MODEL/lost.py is missing"),
        ("link.Own", "MODEL/link.py is a link to /etc/hostname, outside the model folder: put a c"),
    ],
)
def test_code_from_elsewhere_does_not_run(
    name, sentence, prune, model, witness, tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("LOWMEM_GBLM_LINKS", raising=False)
    if name.startswith("link"):
        (model / "link.py").symlink_to("/etc/hostname")
    edit(model / "config.json", auto_map=OWN_MODEL | {"AutoConfig": name})
    with pytest.raises(CheckpointError) as caught:
        prune(tmp_path / "out")
    assert str(caught.value).replace(str(model), "MODEL").startswith(sentence)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("file", "code", "sentence"),
    [
        ("modeling_own.py", "def", "build from this config.json: invalid syntax"),
        ("modeling_own.py", "x = nowhere", "build from this config.json: name 'nowhere' is not de"),
        ("modeling_own.py", "import nowhere_at_all", "build from this config.json: This modeling "),
        ("configuration_own.py", "1 / 0", "can make nothing of .* division by zero"),
        ("tokenization_own.py", "1 / 0", "has no usable tokenizer: division by zero"),
        (
            "modeling_own.py",
            MODEL.replace("self.twist\n        return", "self.lost\n        return"),
            "the code that comes with the checkpoint cannot run decoder block 0: 'OwnMLP' object",
        ),
    ],
)
def test_code_that_fails_is_reported_in_a_sentence(
    file, code, sentence, prune, model, witness, tmp_path
) -> None:
    (model / file).write_text(code)
    with pytest.raises(CheckpointError, match=sentence):
        prune(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_downloaded_only_if_it_is_trusted(trusted, model, witness, monkeypatch) -> None:
    wanted: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str], **options: object) -> str:
        wanted.extend(allow_patterns)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.locate("some/model", code=trusted) == model
    assert ("*.py" in wanted) == trusted
    assert "*.safetensors" in wanted


def test_the_flag_is_one_of_every_command_that_opens_a_model(
    model, witness, text_file, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--nsamples", "2", "--seqlen", "32", "--calibration", str(text_file)]
    text = ["--text", str(text_file), "--seqlen", "32", "--windows", "2"]
    for argv in (
        ["plan", "model", *small],
        ["prune", "model", "out", *small],
        ["eval", "out", *text],
        ["compare", "model", "--methods", "wanda", *small, *text[:2], "--windows", "2"],
    ):
        assert main(argv) == 3
        assert "add --trust-remote-code" in capsys.readouterr().err
        assert main([*argv, "--trust-remote-code"]) == 0
