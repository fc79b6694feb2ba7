"""The pruned checkpoint as an ordinary one: what is in it, what stays, what never appears."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_gblm
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import DiskFull, RequestError
from lowmem_gblm.storage.checkpoint.writer import CheckpointWriter
from support import reference
from support.tiny_models import save_tiny

BITS = {2: torch.int16, 4: torch.int32}
SIDE_FILES = {
    "LICENSE": "Do as you like.\n",
    "README.md": "# A model\n",
    "chat_template.jinja": "{{ messages }}",
    "notes/made.txt": "by hand",
}
FOREIGN_FILES = {
    "pytorch_model.bin": "weights",
    "onnx/model.onnx": "weights",
    "pruning.json": '{"method": "another"}',
    "pytorch_model.bin.index.json": "{}",
    ".git/config": "[core]",
}
RECORDED = {
    "model", "method", "sparsity", "pattern", "alpha", "gradient_norm", "activations", "nsamples",
    "seqlen", "seed", "sparsity_measured", "tensors", "seconds", "memory", "bytes", "flops",
    "versions",
}  # fmt: skip
MEMORY = {"host_peak_bytes", "host_planned_bytes", "gpu_peak_bytes", "gpu_planned_bytes"}


@dataclass
class Pruned:
    """A model, what became of it, and the record that `prune` returned."""

    source: Path
    output: Path
    record: dict[str, Any]

    def tensors(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, tensor of the source, tensor of the output."""
        before, after = tensors_of(self.source), tensors_of(self.output)
        assert before.keys() == after.keys()
        return [(name, before[name], after[name]) for name in before]

    def pruned_tensors(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        return [one for one in self.tensors() if one[0] in self.record["tensors"]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    kind = BITS[one.dtype.itemsize]
    return one.view(kind) == other.view(kind)


def prune(source: Path, output: Path, text: Path, **options: Any) -> Pruned:
    options = {"nsamples": 2, "seqlen": 32, "calibration": str(text)} | options
    return Pruned(source, output, lowmem_gblm.prune(source, output, **options))


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def pruned(request, tmp_path_factory, text_file) -> Pruned:
    """Pruned by half, with all kinds of files beside the weights."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny(request.param, folder / "model", sharded=True)
    for name, content in (SIDE_FILES | FOREIGN_FILES).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    return prune(source, folder / "pruned", text_file)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def of_dtype(request, tmp_path_factory, text_file) -> Pruned:
    """Pruned by half, from a checkpoint in this dtype."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny("llama", folder / "model", dtype=getattr(torch, request.param))
    return prune(source, folder / "pruned", text_file)


@pytest.mark.parametrize("name", SIDE_FILES)
def test_files_beside_the_weights_come_along(pruned, name):
    copy = "README.base.md" if name == "README.md" else name
    assert (pruned.output / copy).read_text() == SIDE_FILES[name]


def test_config_and_tokenizer_come_along_byte_by_byte(pruned):
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (pruned.output / name).read_bytes() == (pruned.source / name).read_bytes()


@pytest.mark.parametrize("name", sorted(FOREIGN_FILES.keys() - {"pruning.json"}))
def test_other_weights_and_caches_stay_behind(pruned, name):
    assert not (pruned.output / name).exists()


def test_nothing_is_left_beside_the_output(pruned):
    assert {path.name for path in pruned.output.parent.iterdir()} == {"model", "pruned"}
    assert not [path for path in pruned.output.rglob("*") if path.name.startswith(".")]


def test_a_small_model_is_one_file(pruned):
    names = [path.name for path in pruned.output.glob("*.safetensors*")]
    assert names == ["model.safetensors"]


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize(
    ("blocks_of_a_shard", "blocks"),
    [(0.01, ["0", "1", "2", None]), (2, ["01", "2", None]), (3, ["012", None])],
)
def test_shards_hold_complete_blocks_up_to_a_size(
    blocks_of_a_shard, blocks, activations, tmp_path, text_file
):
    """The last shard has what no block holds, which is larger than a block here."""
    source = save_tiny("llama", tmp_path / "model", width=16)
    in_blocks = {
        index: {name: one for name, one in tensors_of(source).items() if f"layers.{index}." in name}
        for index in "012"
    }
    one_block = sum(tensor.nbytes for tensor in in_blocks["0"].values())
    size = int(one_block * blocks_of_a_shard)
    options = {"method": "gradient", "activations": activations, "max_shard_size": size}
    made = prune(source, tmp_path / "out", text_file, **options)
    shards = {path.name: load_file(path) for path in sorted(made.output.glob("*.safetensors"))}
    count = len(blocks)
    assert list(shards) == [f"model-{at + 1:05d}-of-{count:05d}.safetensors" for at in range(count)]
    for tensors, held in zip(shards.values(), blocks[:-1], strict=False):
        assert tensors.keys() == {name for index in held for name in in_blocks[index]}
    index = json.loads((made.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard in shards for name in shards[shard]}
    total = sum(tensor.nbytes for tensor in tensors_of(made.output).values())
    assert index["metadata"] == {"total_size": total}
    assert AutoModelForCausalLM.from_pretrained(made.output)
    assert made.record["shards"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in shards
        for data in [(made.output / name).read_bytes()]
    }


def test_a_shard_without_a_size_is_refused():
    with pytest.raises(RequestError, match="--max-shard-size must be at least 1B; got 0"):
        PruneRequest(model="m", max_shard_size=0)


def test_in_place_has_the_shards_of_the_model(tmp_path):
    with pytest.raises(RequestError, match="--in-place keeps the shards of MODEL: leave out"):
        PruneRequest(model=str(tmp_path), in_place=True, max_shard_size=1000)


def test_mergekit_loads_it_like_any_other(pruned):
    loading = "mergekit.io.lazy_tensor_loader"
    found = pytest.importorskip(loading, reason="needs mergekit")
    loader = found.LazyTensorLoader.from_disk(str(pruned.output))
    expected = tensors_of(pruned.output)
    assert loader.index.tensor_paths.keys() == expected.keys()
    assert all(torch.equal(loader.get_tensor(name), one) for name, one in expected.items())


def test_transformers_loads_it_like_any_other(pruned):
    _, messages = AutoModelForCausalLM.from_pretrained(pruned.output, output_loading_info=True)
    assert not any(messages.values())
    ids = AutoTokenizer.from_pretrained(pruned.output)("a river")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(pruned.source)("a river")["input_ids"]


@pytest.mark.parametrize("folder", ["source", "output"])
def test_streamed_perplexity_is_that_of_the_whole_model(pruned, text_file, folder):
    path = getattr(pruned, folder)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text_file.read_text())["input_ids"])
    measured = lowmem_gblm.evaluate(path, text=str(text_file), seqlen=48, windows=5)
    assert measured["windows"] == 5
    expected = reference.perplexity(model, ids, 48, windows=5)
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_gemma_is_measured_on_windows_that_begin_with_bos(text_file, tmp_path):
    folder = save_tiny("gemma2", tmp_path / "gemma")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text_file.read_text())["input_ids"])
    windows = [torch.cat([ids[:1], text]) for text in ids[1:][: 5 * 47].view(5, 47)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = reference.perplexity(model, torch.cat(windows), 48)
    asked = {"text": str(text_file), "seqlen": 48, "windows": 5}
    measured = lowmem_gblm.evaluate(folder, **asked)
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-6)
    without = lowmem_gblm.evaluate(folder, bos="never", **asked)
    assert without["perplexity"] == pytest.approx(reference.perplexity(model, ids, 48, 5), rel=1e-6)


def test_kept_weights_and_unpruned_tensors_have_the_bits_of_the_source(pruned):
    for name, before, after in pruned.tensors():
        same = same_bits(before, after)
        assert (same | (after == 0)).all() if name in pruned.record["tensors"] else same.all()


def test_source_dtype_and_kept_bits_survive_a_computation_in_another(of_dtype):
    for _, before, after in of_dtype.tensors():
        assert before.dtype == after.dtype
    for _, before, after in of_dtype.pruned_tensors():
        assert (same_bits(before, after) | (after == 0)).all()
        assert not ((after == 0) & after.signbit()).any()


def test_half_precision_rows_lose_exactly_half(of_dtype):
    for _, _, after in of_dtype.pruned_tensors():
        assert ((after == 0).sum(dim=1) == after.shape[1] // 2).all()


def test_what_is_pruned_is_what_the_reference_would_prune(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned.source)
    assert pruned.record["tensors"].keys() == {one.name for one in reference.prunable(model)}


def test_recorded_zeros_and_shapes_are_true(pruned):
    zeros = numel = 0
    for name, _, after in pruned.pruned_tensors():
        entry = pruned.record["tensors"][name]
        assert (entry["shape"], entry["zeros"]) == (list(after.shape), int((after == 0).sum()))
        zeros, numel = zeros + entry["zeros"], numel + after.numel()
    assert pruned.record["sparsity_measured"] == zeros / numel == 0.5


def test_pruning_json_is_the_record_and_has_all_that_is_promised(pruned):
    record = json.loads((pruned.output / "pruning.json").read_text())
    assert record == pruned.record
    assert record.keys() >= RECORDED
    assert record["memory"].keys() == MEMORY
    assert record["bytes"].keys() == {"read", "written"}


def test_recorded_seconds_are_those_of_every_stage(pruned):
    stages = ["embed", "dense", "head", "reverse", "prune", "finish", "total"]
    assert list(pruned.record["seconds"]) == stages


def test_recorded_bytes_are_those_of_the_files(pruned):
    written = sum(path.stat().st_size for path in pruned.output.glob("*.safetensors"))
    assert pruned.record["bytes"]["written"] == written
    assert pruned.record["bytes"]["read"] > 3 * 0.9 * written
    assert pruned.record["bytes_planned"]["read"] == pruned.record["bytes"]["read"]
    assert pruned.record["bytes_planned"]["written"] == pytest.approx(written, rel=0.05)


def test_flops_are_twelve_per_active_weight_and_token_but_for_the_last_block(pruned):
    """Nobody reads what leaves the last pruned block: it runs forward once less."""
    names = pruned.record["tensors"]
    numel = sum(math.prod(one["shape"]) for one in names.values())
    if "mixtral" in str(pruned.source):
        experts = [one for name, one in pruned.record["tensors"].items() if "experts" in name]
        # Two of four experts meet a token.
        numel -= sum(math.prod(one["shape"]) for one in experts) // 2
    depth = len({name.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for name in names})
    assert pruned.record["flops"] == pytest.approx((12 - 2 / depth) * numel * 2 * 32)


def test_the_request_is_recorded(tmp_path, llama, text_file):
    asked = {
        "method": "gblm",
        "pattern": "1:4",
        "nsamples": 3,
        "seqlen": 16,
        "seed": 7,
        "activations": "dense",
        "alpha": 2.5,
        "gradient_norm": "l2",
        "calibration": str(text_file),
    }
    record = lowmem_gblm.prune(llama, tmp_path / "out", **asked)
    names = {"model": llama.name, "calibration": text_file.name}
    assert record.items() >= (asked | names | {"sparsity": 0.75}).items()


@pytest.mark.parametrize(("method", "norm"), [("wanda", None), ("gradient", "l1")])
def test_an_option_that_the_method_has_not_is_null_in_the_record(
    method, norm, tmp_path, llama, text_file
):
    record = prune(llama, tmp_path / "out", text_file, method=method).record
    assert (record["alpha"], record["gradient_norm"]) == (None, norm)


def test_the_config_says_nothing_about_sparsity(pruned):
    assert "sparsity_config" not in json.loads((pruned.output / "config.json").read_text())


def test_two_runs_write_the_same_bytes(tmp_path, llama, text_file):
    for name in ("one", "two"):
        prune(llama, tmp_path / name, text_file)
    for path in (tmp_path / "one").iterdir():
        if path.name != "pruning.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("step", ["write_block", "write_rest", "publish", "_index"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_run_that_fails_can_be_gone_on_with(step, error, tmp_path, llama, text_file, monkeypatch):
    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, step, fail)
        with pytest.raises(DiskFull if isinstance(error, OSError) else KeyboardInterrupt):
            prune(llama, tmp_path / "out", text_file, max_shard_size=1)
    assert not (tmp_path / "out").exists()
    prune(llama, tmp_path / "out", text_file, max_shard_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_do_not_get_into_the_next_one(tmp_path, llama, text_file):
    for name in ("out.partial", "out.work"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / ".lowmem-gblm").touch()
        (tmp_path / name / "model-00009-of-00009.safetensors").touch()
    prune(llama, tmp_path / "out", text_file)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_an_output_within_the_model_s_own_folder_holds_no_copy_of_itself_or_another(
    tmp_path, llama, text_file
):
    source = tmp_path / "model"
    shutil.copytree(llama, source)
    for name in ("pruned", "again"):
        prune(source, source / name, text_file)
        assert not [path for path in (source / name).iterdir() if path.is_dir()]
        lowmem_gblm.verify(source / name, source)


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({"include": ("*.q_proj.weight",)}, {"q_proj"}),
        ({"include": ("*.mlp.*",), "exclude": ("*down*",)}, {"gate_proj", "up_proj"}),
        ({"exclude": ("*.self_attn.*",)}, {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_globs_choose_what_is_pruned(globs, expected, tmp_path, llama, text_file):
    made = prune(llama, tmp_path / "out", text_file, **globs)
    assert {name.split(".")[-2] for name in made.record["tensors"]} == expected
    for name, before, after in made.tensors():
        assert same_bits(before, after).all() != (name in made.record["tensors"])


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_one_string_is_one_glob(option, tmp_path, llama, text_file):
    for name, globs in (("string", "*q_proj*"), ("tuple", ("*q_proj*",)), ("list", ["*q_proj*"])):
        prune(llama, tmp_path / name, text_file, **{option: globs})
    records = [tmp_path / name / "pruning.json" for name in ("string", "tuple", "list")]
    made = [json.loads(path.read_text())["tensors"] for path in records]
    assert made[0] == made[1] == made[2]
    assert all("q_proj" in name for name in made[0]) == (option == "include")


@pytest.mark.parametrize("globs", [3, [3], {"a": 1}])
def test_what_is_no_glob_is_refused(globs):
    with pytest.raises(RequestError, match="--include takes a glob, or a list of globs, over tens"):
        PruneRequest(model="m", include=globs)


@pytest.mark.parametrize(
    ("globs", "sentence"),
    [
        (
            {"exclude": ["*mpl*", "*norm*", "*self_atn*"]},
            "--exclude '*mpl*' matches no tensor of the model, the nearest is "
            "model.layers.0.mlp.down_proj.weight; --exclude '*self_atn*' matches no tensor of the "
            "model, the nearest is model.layers.0.self_attn.k_proj.weight. Give globs over comp",
        ),
        (
            {"include": ["*q_porj*", "*k_proj*"]},
            "--include '*q_porj*' matches no tensor that can be pruned, the nearest are "
            "model.layers.0.self_attn.q_proj.weight",
        ),
    ],
)
def test_a_glob_that_matches_nothing_is_refused(globs, sentence, llama):
    with pytest.raises(RequestError) as caught:
        lowmem_gblm.plan(llama, method="magnitude", **globs)
    assert sentence in str(caught.value)


def test_a_glob_may_leave_whole_blocks_dense(tmp_path, llama, text_file):
    made = prune(llama, tmp_path / "out", text_file, include=("model.layers.1.*",))
    assert {name.split(".")[2] for name in made.record["tensors"]} == {"1"}
    assert made.record["sparsity_measured"] == 0.5


def test_a_ragged_tail_is_kept_dense_where_that_is_asked(tmp_path, llama, text_file):
    made = prune(llama, tmp_path / "out", text_file, pattern="2:5", on_ragged="keep")
    for _, before, after in made.pruned_tensors():
        whole = after.shape[1] - after.shape[1] % 5
        assert ((after[:, :whole].reshape(-1, 5) == 0).sum(dim=1) == 3).all()
        assert same_bits(before[:, whole:], after[:, whole:]).all()
