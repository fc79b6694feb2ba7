"""Tiny random checkpoints of many architectures, with a byte-level tokenizer, and tiny texts.

Weights are drawn much wider than an initialization would: attention is sharp, biases and norms
are not trivial, so that a mistake in any of them changes a loss or a mask.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
)
VOCABULARY = 320
POSITIONS = 128
HEADS = 4
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
SHARD_SIZE = "64KB"
WORDS = (
    "the a one old small red quiet river house dog bird child tree stone ran saw made found "
    "kept under over near and but then never slowly again it was very cold bright"
)


def save_tiny(
    architecture: str,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    blocks: int = 3,
    width: int = 48,
    sharded: bool = False,
    tied: bool | None = None,
) -> Path:
    """Saves a tiny random checkpoint with its tokenizer, and returns the folder.

    Args:
        architecture: one of `ARCHITECTURES`.
        folder: where to save; created when missing.
        dtype: of the weights on disk; the same seed gives the same weights, rounded.
        seed: decides every weight.
        blocks: number of decoder blocks.
        width: hidden size, a multiple of 8; feed-forward layers are three times as wide.
        sharded: whether to write many small shards and an index instead of one file.
        tied: whether the head shares the embedding; None leaves it to the architecture.
    """
    folder = Path(folder)
    model = tiny_model(architecture, seed=seed, blocks=blocks, width=width, tied=tied)
    limit = {"max_shard_size": SHARD_SIZE} if sharded else {}
    model.to(dtype).save_pretrained(folder, **limit)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_model(
    architecture: str,
    *,
    seed: int = 0,
    blocks: int = 3,
    width: int = 48,
    tied: bool | None = None,
) -> PreTrainedModel:
    """A tiny random float32 model in eval mode; the arguments are those of `save_tiny`."""
    options = _common(blocks, width) | _special(architecture, width)
    if tied is not None:
        options["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(architecture, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model, seed)
    return model


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Draws the matrices anew and shakes norms and biases, from the seed alone.

    OPT keeps a few dead ReLU units: rows without a gradient and columns without an input.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 0.15 * torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise)
        else:
            # Fresh biases are 0 and fresh norms 1 (0 where 1 is added later).
            parameter.add_(noise)


def _common(blocks: int, width: int) -> dict:
    """Configuration under the names that most architectures share."""
    return {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": HEADS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _special(architecture: str, width: int) -> dict:
    """Configuration that one architecture names or needs in its own way."""
    grouped = {"num_key_value_heads": 2}
    own_heads = grouped | {"head_dim": width // HEADS}
    return {
        "llama": grouped,
        "mistral": own_heads | {"sliding_window": 12},
        "qwen2": grouped,
        "qwen3": own_heads,
        "gemma2": own_heads | {"sliding_window": 12, "query_pre_attn_scalar": width // HEADS},
        "gpt2": {"n_inner": 3 * width},
        "gpt_neox": {"rotary_pct": 0.5},
        "opt": {"ffn_dim": 3 * width, "word_embed_proj_dim": width},
        # The jitter acts in train mode only: a run that forgets eval mode shows.
        "mixtral": grouped
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    }[architecture]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes that begins every text with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    bos, eos, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def sample_text(characters: int, seed: int = 0) -> str:
    """Exactly this many ASCII characters of made-up sentences in short paragraphs."""
    draw = random.Random(seed)
    text, vocabulary = "", WORDS.split()
    while len(text) < characters:
        words = [draw.choice(vocabulary) for _ in range(draw.randint(4, 12))]
        ending = draw.choice((". ", ". ", "! ", ".\n\n"))
        text += " ".join(words).capitalize() + ending
    return text[:characters]
