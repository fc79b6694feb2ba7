#!/usr/bin/env python3
"""Writes Llama checkpoints with random weights, block by block: as deep as the disk allows.

A benchmark needs the shapes of a model, not what it has learned. Activations keep their size
through the blocks, so that losses and gradients are finite at any depth.

Usage:
    python tools/bench_model.py FOLDER [--shape laptop|7b|70b|tiny] [--blocks N] [--dtype NAME]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor

DEMO = Path(__file__).resolve().parent.parent / "lowmem_gblm" / "demo"
DTYPES = ("float32", "bfloat16")
# Ids of the embedded model's tokenizer, which is copied into every checkpoint.
TOKENIZER_IDS = 1024
MATRICES_PER_BLOCK = 7

Size = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        blocks: Decoder blocks.
        width: Width of the hidden states.
        ffn: Width between the up and down projections.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        vocabulary: Token ids.
        positions: Longest sequence, in tokens.
    """

    blocks: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int

    def block(self) -> dict[str, Size]:
        """Return name and shape of every tensor of a block, without its prefix."""
        width, ffn = self.width, self.ffn
        kv_width = width // self.heads * self.kv_heads
        return {
            "input_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (kv_width, width),
            "self_attn.v_proj.weight": (kv_width, width),
            "self_attn.o_proj.weight": (width, width),
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (ffn, width),
            "mlp.up_proj.weight": (ffn, width),
            "mlp.down_proj.weight": (width, ffn),
        }

    def rest(self) -> dict[str, Size]:
        """Return name and shape of every tensor outside the blocks."""
        embedding = (self.vocabulary, self.width)
        return {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": (self.width,),
            "lm_head.weight": embedding,
        }

    def matrices(self) -> Counter[Size]:
        """Return how often a block has a matrix [out, in] of each shape."""
        return Counter(size for size in self.block().values() if len(size) == 2)

    @property
    def prunable(self) -> int:
        """Return the number of weights in the matrices of all blocks: P."""
        return self.blocks * sum(math.prod(size) * n for size, n in self.matrices().items())

    def block_bytes(self, itemsize: int) -> int:
        """Return the bytes of all blocks."""
        return self.blocks * itemsize * sum(map(math.prod, self.block().values()))

    def rest_bytes(self, itemsize: int) -> int:
        """Return the bytes of all tensors outside the blocks."""
        return itemsize * sum(map(math.prod, self.rest().values()))


SHAPES = {
    "tiny": Shape(blocks=3, width=64, ffn=176, heads=4, kv_heads=2, vocabulary=1024, positions=512),
    "laptop": Shape(
        blocks=12, width=1024, ffn=2816, heads=16, kv_heads=16, vocabulary=1024, positions=2048
    ),
    "7b": Shape(
        blocks=32, width=4096, ffn=11008, heads=32, kv_heads=32, vocabulary=32000, positions=4096
    ),
    "70b": Shape(
        blocks=80, width=8192, ffn=28672, heads=64, kv_heads=8, vocabulary=32000, positions=4096
    ),
}


def write_llama(
    folder: Path,
    *,
    blocks: int,
    width: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    positions: int,
    dtype: str,
    seed: int,
) -> Path:
    """Write a checkpoint, one block in memory at a time, the index last.

    `folder` is created, with its parents. The sizes are those of `Shape`, `dtype` is that of the
    weights ("float32" or "bfloat16"), and `seed` decides every weight on any number of threads.

    Returns:
        `folder`.

    Raises:
        ValueError: The vocabulary is smaller than that of the tokenizer.
    """
    if vocabulary < TOKENIZER_IDS:
        raise ValueError(f"the tokenizer has {TOKENIZER_IDS} ids; got vocabulary={vocabulary}")
    shape = Shape(
        blocks=blocks, width=width, ffn=ffn, heads=heads, kv_heads=kv_heads,
        vocabulary=vocabulary, positions=positions,
    )  # fmt: skip
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config(shape, dtype))
    for path in DEMO.glob("model/tokenizer*"):
        shutil.copy(path, folder)
    _write_shards(folder, shape, getattr(torch, dtype), seed)
    return folder


def _write_shards(folder: Path, shape: Shape, dtype: torch.dtype, seed: int) -> None:
    weight_map: dict[str, str] = {}
    for index in range(shape.blocks + 1):
        shard = f"model-{index + 1:05d}-of-{shape.blocks + 1:05d}.safetensors"
        sizes = shape.rest()
        if index < shape.blocks:
            sizes = {f"model.layers.{index}.{name}": size for name, size in shape.block().items()}
        tensors = _draw_all(sizes, shape.blocks, dtype, seed)
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sizes, shard)
    total = shape.block_bytes(dtype.itemsize) + shape.rest_bytes(dtype.itemsize)
    index_content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index_content)


def _draw_all(
    sizes: Mapping[str, Size], blocks: int, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Return the tensors of one shard, each from a seed of its own, drawn side by side."""
    with ThreadPoolExecutor(MATRICES_PER_BLOCK) as pool:
        drawn = [
            pool.submit(_draw, name, size, blocks, dtype, crc32(f"{seed} {name}".encode()))
            for name, size in sizes.items()
        ]
    return {name: future.result() for name, future in zip(sizes, drawn, strict=True)}


def _draw(name: str, size: Size, blocks: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Draw one tensor: ones for a norm, else normal with the spread that keeps activations in size.

    What a block adds to the hidden states shrinks with the number of blocks, as in GPT-2.
    """
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    std = 1.0 if "embed_tokens" in name else size[1] ** -0.5
    if "o_proj" in name or "down_proj" in name:
        std /= math.sqrt(2 * blocks)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(size, dtype=dtype).normal_(0.0, std, generator=generator)


def _config(shape: Shape, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.blocks,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": shape.vocabulary,
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description="Writes a Llama checkpoint of random weights.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to create")
    parser.add_argument("--shape", choices=SHAPES, default="laptop", help="[%(default)s]")
    parser.add_argument("--blocks", type=int, metavar="N", help="[those of the shape]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    arguments = parser.parse_args()
    sizes = asdict(SHAPES[arguments.shape])
    sizes["blocks"] = arguments.blocks or sizes["blocks"]
    write_llama(arguments.folder, **sizes, dtype=arguments.dtype, seed=arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
