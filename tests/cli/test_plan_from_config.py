"""A checkpoint from config.json alone is the one whose headers could be read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lowmem_gblm
from lowmem_gblm.errors import CheckpointError, UnsupportedModel
from lowmem_gblm.model import prunable
from lowmem_gblm.model.from_config import _stored_dtype, describe, read_or_describe
from lowmem_gblm.model.prunable import prunable_weights
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.runtime import accelerator
from lowmem_gblm.storage.checkpoint.reader import INDEX, SINGLE, Checkpoint
from lowmem_gblm.storage.hub import locate
from support.tiny_models import ARCHITECTURES, save_tiny

SIZES = {
    "vocab_size": 320, "max_position_embeddings": 128, "num_hidden_layers": 2, "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
OTHERS = {
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": EXPERTS | LATENT | {"n_routed_experts": 4},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {},
    "phi3": {},
}


def save(architecture: str, folder: Path, dtype: torch.dtype) -> Path:
    if architecture in ARCHITECTURES:
        return save_tiny(architecture, folder, dtype=dtype, sharded=architecture == "llama")
    config = AutoConfig.for_model(architecture, **(SIZES | OTHERS[architecture]))
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def only_config(model: Path, folder: Path) -> Path:
    """A folder with the config.json of a model and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def config(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | values))
    return folder


def contents(checkpoint: Checkpoint) -> dict[str, tuple]:
    return {
        name: (entry.shape, entry.dtype, entry.nbytes) for name, entry in checkpoint.tensors.items()
    }


def groups(checkpoint: Checkpoint) -> tuple[list, list, list]:
    """Names of every block and of the rest, and what can be pruned in every block."""
    streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    weights = [sorted(block, key=str) for block in prunable_weights(checkpoint, streamed)]
    return (
        [sorted(names) for names in streamed.block_tensors],
        sorted(streamed.rest_tensors),
        weights,
    )


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((architecture, torch.float32) for architecture in (*ARCHITECTURES, *OTHERS)),
        *((architecture, torch.bfloat16) for architecture in ("llama", "mixtral", "deepseek_v3")),
    ],
)
def test_the_description_is_what_the_headers_say(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save(architecture, tmp_path / "model", dtype)
    real, described = Checkpoint(model), describe(only_config(model, tmp_path / "config"))
    assert contents(described) == contents(real)
    assert groups(described) == groups(real)
    assert (real.on_disk, described.on_disk) == (True, False)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_a_block_that_is_like_an_earlier_one_is_not_looked_into_again(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(save(architecture, tmp_path / "model", torch.float32))
    streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    find, looked = prunable._prunable, []

    def counting(*args):
        looked.append(args[-1])
        return find(*args)

    one_by_one = [find(checkpoint, streamed, index) for index in range(streamed.depth)]
    monkeypatch.setattr(prunable, "_prunable", counting)
    assert prunable_weights(checkpoint, streamed) == one_by_one
    # The first block of DeepSeek has no experts.
    assert looked == ([0, 1] if architecture == "deepseek_v3" else [0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once(tied: bool, tmp_path: Path) -> None:
    names = describe(config(tmp_path, tie_word_embeddings=tied)).tensors
    assert ("lm_head.weight" not in names) == tied
    assert "model.embed_tokens.weight" in names


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({}, torch.float32),
    ],
)
def test_the_dtype_is_that_of_the_configuration(
    values: dict, dtype: torch.dtype, tmp_path: Path
) -> None:
    entries = describe(config(tmp_path, **values)).tensors.values()
    assert {entry.dtype for entry in entries} == {dtype}


def test_the_dtype_may_be_that_of_the_text_model() -> None:
    nested = AutoConfig.for_model("gemma3", text_config={"dtype": "bfloat16"})
    assert _stored_dtype(nested) == torch.bfloat16


LARGE = {
    "llama-3-70b": ((8192, 28672, 80, 64), 70_553_706_496),
    "llama-3-405b": ((16384, 53248, 126, 128), 405_853_388_800),
}


@pytest.mark.parametrize(("sizes", "parameters"), LARGE.values(), ids=LARGE)
def test_the_largest_models_are_described_in_seconds(
    sizes: tuple[int, ...], parameters: int, tmp_path: Path
) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
    folder = config(tmp_path, **dict(zip(names, sizes, strict=True)), **more)
    start = time.monotonic()
    described = describe(folder)
    blocks, _, weights = groups(described)
    assert time.monotonic() - start < 10
    assert described.nbytes() == 2 * parameters
    assert len(blocks) == sizes[2]
    assert {len(block) for block in weights} == {7}


@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        ({"model_type": "nothing"}, UnsupportedModel, "transformers can make nothing of"),
        ({"model_type": "t5"}, UnsupportedModel, "'t5' is not a decoder-only language model"),
        ({"quantization_config": {"quant_method": "fp8"}}, CheckpointError, r"quantized \(fp8\)"),
        ({"auto_map": {}}, UnsupportedModel, "asks for Python code"),
    ],
)
def test_what_could_not_be_pruned_is_not_described(
    values: dict, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        describe(config(tmp_path, **values))


def test_a_conversion_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model, tensors):
        raise ValueError("no way back. And more")

    monkeypatch.setattr("lowmem_gblm.model.from_config.as_stored", failing)
    sentence = (
        r"cannot tell from config\.json how its weights are stored \(no way back\)\. Download"
    )
    with pytest.raises(UnsupportedModel, match=sentence):
        describe(config(tmp_path))


def test_headers_are_read_where_there_are_any(llama: Path) -> None:
    assert read_or_describe(llama).on_disk


@pytest.mark.parametrize("left", [0, 1])
def test_a_download_that_was_interrupted_is_described(left: int, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", sharded=True)
    whole = read_or_describe(model)
    for shard in sorted(model.glob("*.safetensors"))[left:]:
        shard.unlink()
    described = read_or_describe(model)
    assert (whole.on_disk, described.on_disk) == (True, False)
    assert contents(described) == contents(whole)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("pytorch_model.bin", "", "as pickles"),
        (SINGLE, "", "is no complete safetensors file"),
        ("adapter.safetensors", "", "has neither"),
        (INDEX, '{"weight_map": {"x": "../x.safetensors"}}', "is not a file of the folder"),
        (INDEX, '{"weight_map": {"x": 3}}', "is not a file of the folder"),
        (INDEX, '{"weight_map": []}', "has no weight_map"),
        (INDEX, "{", "is not JSON"),
    ],
)
def test_what_is_refused_is_refused_for_a_plan_too(
    name: str, content: str, sentence: str, tmp_path: Path
) -> None:
    (config(tmp_path) / name).write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        read_or_describe(tmp_path)


def test_a_folder_without_anything_lacks_its_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_or_describe(tmp_path)


class Hub:
    """Has one model, and remembers what was asked for."""

    def __init__(self, folder: Path, **values: object) -> None:
        self._folder = folder
        self._values = values
        self.asked: list[str] = []

    def __call__(self, model: str, *, allow_patterns: list[str], **more: object) -> str:
        self.asked = allow_patterns
        return str(config(self._folder, **self._values))


def test_for_a_plan_the_hub_is_asked_for_the_configuration_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    folder = locate("some/model", weights=False)
    assert hub.asked == ["config.json"]
    assert not read_or_describe(folder).on_disk
    locate("some/model")
    assert "*.safetensors" in hub.asked


def test_what_is_refused_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "snapshot", quantization_config={"quant_method": "gptq"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(CheckpointError, match=r"snapshot is quantized \(gptq\)"):
        lowmem_gblm.prune("some/model", tmp_path / "out", method="magnitude")
    assert hub.asked == ["config.json"]


def test_a_folder_needs_no_weights_to_be_found(tmp_path: Path) -> None:
    assert locate(str(tmp_path), weights=False) == tmp_path


@pytest.mark.parametrize(("dtype", "holds"), [("float32", True), ("bfloat16", False)])
def test_a_plan_has_room_for_the_attention_of_a_gpu_that_is_not_here(
    dtype: str, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, heads that share keys may have no kernel without [heads, T, T]."""
    monkeypatch.setattr(accelerator, "is_here", lambda device: False)
    heads, seqlen = SIZES["num_attention_heads"], 1024
    shared, own = (
        lowmem_gblm.plan(
            config(tmp_path / "model", num_key_value_heads=number, max_position_embeddings=seqlen),
            dtype=dtype, seqlen=seqlen, device="cuda", gpu_memory="8GiB",
        )["predicted"]["gpu_bytes"]
        for number in (heads // 2, heads)
    )  # fmt: skip
    assert (shared - own > heads * seqlen**2 * 4) is holds
