"""What is pruned, refused and said beyond the architectures of the engine tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

import lowmem_gblm
from lowmem_gblm.errors import CheckpointError, UnsupportedModel
from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight, Tap
from lowmem_gblm.model.meta_model import build_meta_model
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.sweeps.statistics import find_statistic
from lowmem_gblm.sweeps.statistics.gradient import GradientL1, loss_scale
from support.tiny_models import sample_text, tiny_model, tiny_tokenizer

SIZES = {
    "vocab_size": 320, "max_position_embeddings": 128, "num_hidden_layers": 2, "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
INKLING = EXPERTS | {
    "n_routed_experts": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 320, "eos_token_id": 1,
}  # fmt: skip


def save(folder: Path, model_type: str, **changes: object) -> Path:
    """A random model of any architecture, with a tokenizer and a text beside it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(sample_text(3000))
    return folder / "model"


def prune(folder: Path, **options: object) -> dict:
    return lowmem_gblm.prune(
        folder / "model", folder / "out", nsamples=2, seqlen=24,
        calibration=str(folder / "text.txt"), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_moe", EXPERTS),
        ("hunyuan_v1_moe", EXPERTS | {"moe_topk": 2}),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_experts_are_pruned_and_routers_are_not(
    model_type: str, changes: dict, tmp_path: Path
) -> None:
    save(tmp_path, model_type, **changes)
    pruned = prune(tmp_path)["tensors"]
    assert not [name for name in pruned if "router" in name or ".gate." in name]
    assert [name for name in pruned if "expert" in name or "mlp.input_linear" in name]
    lowmem_gblm.verify(tmp_path / "out", against=tmp_path / "model")


def test_what_stays_dense_inside_blocks_is_noted(tmp_path: Path) -> None:
    save(
        tmp_path, "dbrx", d_model=32, n_heads=4, n_layers=2, max_seq_len=128,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    )  # fmt: skip
    (note,) = prune(tmp_path, method="magnitude")["notes"]
    assert "matrices inside decoder blocks (" in note
    assert "ffn.experts.mlp.w1" in note or "ffn.experts.mlp.v1" in note


@pytest.mark.parametrize(
    ("model_type", "changes", "sentence"),
    [
        ("mamba", {"state_size": 8, "time_step_rank": 4}, "never multiplied activations with"),
        ("rwkv", {"attention_hidden_size": 32}, "cannot be run around stand-ins"),
        ("bert", {"is_decoder": True}, "is not built like a decoder-only language model"),
        ("inkling2_text", INKLING, "experts.w13_weight becomes no regular slice of a parameter"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    model_type: str, changes: dict, sentence: str, tmp_path: Path
) -> None:
    save(tmp_path, model_type, **changes)
    with pytest.raises(UnsupportedModel, match=sentence):
        prune(tmp_path)
    assert not (tmp_path / "out").exists()


def test_tables_beyond_the_weights_are_refused_before_they_are_made(tmp_path: Path) -> None:
    """Sines for every position, in every block."""
    path = save(tmp_path, "gptj", n_positions=128, rotary_dim=8) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_positions": 1 << 26}))
    with pytest.raises(CheckpointError) as caught:
        prune(tmp_path)
    tables = 2 * (1 << 26) * 8 * 4
    assert re.fullmatch(
        rf"{path} asks for tables of {tables} bytes beside weights of \d+ bytes", str(caught.value)
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", vocab_size=100)
    with pytest.raises(CheckpointError) as caught:
        prune(tmp_path)
    assert re.fullmatch(
        rf"the tokenizer of {folder} gives the token id \d{{3}}, the model has 100 tokens: they do "
        rf"not belong together",
        str(caught.value),
    )


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other tensors in the only file of a model."""
    path = folder / "model.safetensors"
    edited = edit({name: one.clone() for name, one in load_file(path).items()})
    save_file(edited, path, {"format": "pt"})


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("pattern", "renamed", "sentence"),
    [
        (r"(layers.1.*)w[13]", None, rf"lacks the tensor for {GATE_UP} \(1 such tensors\)$"),
        (r"(layers.1.*)w1", None, f"^{GATE_UP} could not be converted: "),
        (
            r"(layers.1.)block_sparse_moe(.*w2)",
            r"\1mlp\2",
            "^it cannot be followed which part of the model model.layers.1.mlp.experts.0.w2.weight "
            "becomes: its name or number does not fit those of the tensors beside it$",
        ),
    ],
    ids=["none of one kind", "half of one kind", "names of two kinds"],
)
def test_experts_that_do_not_fit_together_are_refused(
    pattern: str, renamed: str | None, sentence: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if renamed is None:
            return {name: one for name, one in tensors.items() if not re.search(pattern, name)}
        return {re.sub(pattern, renamed, name): one for name, one in tensors.items()}

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=sentence):
        prune(tmp_path, method="magnitude")
    assert not (tmp_path / "out").exists()


def convert(monkeypatch: pytest.MonkeyPatch, on_disk: str, parts: list[str], *ways: object) -> None:
    """From now on transformers makes these parameters of a Llama from that tensor on disk."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(known, "llama", [WeightConverter(on_disk, parts, operations=list(ways))])


def store(folder: Path, on_disk: str, parts: list[str], join: Callable[..., Tensor]) -> None:
    """Replace these tensors of both blocks by what `join` makes of them."""

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for block in ("model.layers.0.", "model.layers.1."):
            tensors[block + on_disk] = join(*(tensors.pop(block + part) for part in parts))
        return tensors

    edit_tensors(folder, edit)


QUERY = ["self_attn.q_proj.weight"]


def test_a_matrix_that_lies_transposed_on_the_disk_is_pruned_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is square: its shape does not tell."""
    prune(Path(save(tmp_path / "plain", "llama")).parent)
    folder = save(tmp_path, "llama")
    store(folder, "self_attn.wq.weight", QUERY, lambda matrix: matrix.T.contiguous())
    convert(monkeypatch, "self_attn.wq.weight", QUERY, Transpose(0, 1))
    prune(tmp_path)
    shard = "out/model.safetensors"
    plain, found = load_file(tmp_path / "plain" / shard), load_file(tmp_path / shard)
    for block in (0, 1):
        name = f"model.layers.{block}.self_attn"
        assert torch.equal(plain[f"{name}.q_proj.weight"], found[f"{name}.wq.weight"].T)
        assert torch.equal(plain[f"{name}.o_proj.weight"], found[f"{name}.o_proj.weight"])


def test_rows_that_lie_interleaved_on_the_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "llama")
    store(folder, "self_attn.wq.weight", QUERY, lambda matrix: matrix)
    convert(monkeypatch, "self_attn.wq.weight", QUERY, Interleave(dim=0))
    sentence = "^model.layers.0.self_attn.wq.weight becomes no regular slice of a parameter$"
    with pytest.raises(UnsupportedModel, match=sentence):
        prune(tmp_path)


def test_a_matrix_that_is_split_into_several_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    store(save(tmp_path, "llama"), "mlp.w13.weight", parts, lambda *pair: torch.cat(pair))
    convert(monkeypatch, "mlp.w13.weight", parts, Chunk(dim=0))
    sentence = "^model.layers.0.mlp.w13.weight is split into several parameters of the model$"
    with pytest.raises(UnsupportedModel, match=sentence):
        prune(tmp_path)


def test_a_block_that_is_not_filled_is_not_run(llama: Path) -> None:
    streamed = open_model(str(llama), Resources()).streamed
    with pytest.raises(CheckpointError) as caught:
        streamed.load_block(0, {})
    assert str(caught.value) == (
        "decoder block 0 lacks model.layers.0.self_attn.q_proj.weight (9 such tensors)"
    )


def test_hidden_states_changed_between_blocks_are_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(str(llama), Resources())
    opened.streamed.fill(opened.checkpoint)
    decoder = opened.streamed._decoder
    original = decoder.forward

    def halving(*args: object, **kwargs: object):
        handles = [
            layer.register_forward_pre_hook(lambda module, given: (given[0] * 0.5, *given[1:]))
            for layer in decoder.layers
        ]
        try:
            return original(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(decoder, "forward", halving)
    with pytest.raises(UnsupportedModel, match="changed between decoder blocks 0 and 1"):
        opened.streamed.embed(torch.arange(8)[None])


class Keeping:
    """An observer that keeps the products."""

    def __init__(self) -> None:
        self.products: list[Matmul] = []

    def observe(self, product: Matmul) -> None:
        self.products.append(product)


SLOT = MatmulWeight(parameter="weight", expert=None, in_first=False)


def tapped(block: nn.Module, observer: object, run) -> Tap:
    tap = Tap(block, [SLOT], [observer])
    with tap:
        run(block.weight)
    return tap


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, weight: nn.functional.linear(x, weight),
        lambda x, weight: nn.functional.linear(x, weight=weight),
        lambda x, weight: x @ weight.T,
        lambda x, weight: torch.matmul(x, weight.T),
        lambda x, weight: torch.addmm(torch.zeros(6), x, weight.T),
        lambda x, weight: torch.mm(x, weight.mT),
    ],
)
def test_the_tap_sees_every_way_to_multiply(multiply) -> None:
    block, seen, x = nn.Linear(4, 6, bias=False), Keeping(), torch.randn(3, 4)
    tap = tapped(block, seen, lambda weight: multiply(x, weight))
    tap.check_all_seen()
    (product,) = seen.products
    assert torch.equal(product.input_TI, x)
    assert torch.equal(product.out, x @ block.weight.T)


def test_a_matrix_that_is_multiplied_in_parts_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="weight is multiplied in parts"):
        tapped(nn.Linear(4, 6), Keeping(), lambda w: nn.functional.linear(torch.ones(1, 4), w[:3]))


def test_a_matrix_that_is_multiplied_the_other_way_round_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="the other way round"):
        tapped(nn.Linear(4, 4), Keeping(), lambda weight: torch.ones(1, 4) @ weight)


def test_a_matrix_that_is_never_multiplied_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="never multiplied activations with weight"):
        tapped(nn.Linear(4, 4), Keeping(), lambda weight: weight.sum()).check_all_seen()


def test_an_input_that_is_changed_after_its_product_is_refused() -> None:
    block = nn.Linear(4, 4, bias=False).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True) * 1

    def run(weight: Tensor) -> None:
        out = nn.functional.linear(x, weight)
        x.mul_(3)
        out.sum().backward()

    with pytest.raises(UnsupportedModel, match="changed after it was multiplied"):
        tapped(block, GradientL1(), run)


def test_router_logits_asked_for_by_the_configuration_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    assert prune(tmp_path)["sparsity_measured"] == 0.5


def test_the_hollow_model_holds_no_parameter(llama: Path) -> None:
    model = build_meta_model(open_model(str(llama), Resources()).checkpoint, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 2048)]
)
def test_only_float16_scales_its_loss(dtype: torch.dtype, scale: int) -> None:
    assert loss_scale(dtype, 2048) == scale


def test_a_scaled_loss_keeps_small_gradients_in_float16(llama: Path) -> None:
    opened = open_model(str(llama), Resources())
    streamed = StreamedModel(opened.checkpoint, torch.device("cpu"), torch.float16)
    streamed.fill(opened.checkpoint)
    tokens = torch.arange(5, 69)[None]
    # As far from 1 as gradients are in a trained model of real width.
    hidden = streamed.embed(tokens) * 4096
    _, plain = streamed.loss_and_gradient(hidden, tokens)
    _, scaled = streamed.loss_and_gradient(hidden, tokens, loss_scale(torch.float16, 64))
    assert int((scaled == 0).sum()) < int((plain == 0).sum())
    torch.testing.assert_close(scaled.float() / 64, plain.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_scale_of_the_loss_is_divided_out_exactly(norm: str) -> None:
    found = []
    for scale in (1.0, 64.0):
        torch.manual_seed(0)
        block = nn.Linear(4, 6, bias=False).requires_grad_(False)
        gradient = find_statistic(f"gradient_{norm}")(scale)
        x = torch.randn(3, 4, requires_grad=True)
        with Tap(block, [SLOT], [gradient]):
            loss = block(x).square().sum() * scale
        loss.backward()
        found.append(gradient.results()[SLOT])
    assert torch.equal(*found)


def test_a_tiny_model_of_one_block_works(tmp_path: Path) -> None:
    tiny_model("llama", seed=0, blocks=1, width=48, tied=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sample_text(3000))
    assert prune(tmp_path)["sparsity_measured"] == 0.5
