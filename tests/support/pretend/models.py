"""config.json of models that are large, with three decoder blocks: more take no more memory."""

from __future__ import annotations

from typing import Any

GIB = 1 << 30


def llama(hidden: int, inner: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": 3,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


MODELS: dict[str, dict[str, Any]] = {
    "7B": llama(4096, 11008, 32, 32, 32000),
    "70B": llama(8192, 28672, 64, 8, 128256),
    "405B": llama(16384, 53248, 128, 8, 128256),
    "Mixtral 8x7B": llama(4096, 14336, 32, 8, 32000)
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
