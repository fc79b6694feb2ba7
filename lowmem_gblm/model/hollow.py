"""A model on `meta` from the configuration of a checkpoint."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_gblm.disk.checkpoint import Checkpoint, read_json
from lowmem_gblm.errors import CheckpointError, UnsupportedModel

# What transformers raises when config.json makes no sense, or a model cannot run as it is run here.
FOREIGN_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)


def hollow_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with every parameter on `meta`, in eval mode.

    Raises:
        UnsupportedModel: Not a decoder-only language model that transformers knows.
        CheckpointError: See `load_config`.
    """
    config = load_config(checkpoint)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except FOREIGN_ERRORS as error:
        raise UnsupportedModel(
            f"{config.model_type!r} is not a decoder-only language model that transformers can "
            f"build from this config.json: {reason(error)}"
        ) from None
    model.set_experts_implementation("eager")
    # Router logits would be gathered from blocks that are not there.
    model.config.output_router_logits = False
    # Mixtral's router adds noise in train mode.
    model.eval()
    return model


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UnsupportedModel: The architecture is unknown, or would need code from the checkpoint.
        CheckpointError: There is no valid config.json, or the weights are quantized.
    """
    raw = read_json(checkpoint.folder / "config.json")
    if "auto_map" in raw:
        raise UnsupportedModel(
            f"{checkpoint.folder} needs Python code that comes with the checkpoint; such code is "
            f"never run here"
        )
    quantization = raw.get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{checkpoint.folder} is quantized ({kind}): "
            f"prune the original checkpoint, then quantize the result"
        )
    try:
        return AutoConfig.from_pretrained(checkpoint.folder)
    except FOREIGN_ERRORS as error:
        raise UnsupportedModel(
            f"transformers can make nothing of {checkpoint.folder}/config.json "
            f"(model_type {raw.get('model_type')!r}): {reason(error)}"
        ) from None


def find_layers(model: PreTrainedModel, decoder: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks.

    Raises:
        UnsupportedModel: There is none of the length that the configuration says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if depth < 1:
        raise UnsupportedModel(f"{type(model).__name__} is said to have {depth} decoder blocks")
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModel(
        f"{type(model).__name__} is not built like a decoder-only language model: its decoder has "
        f"no list of {depth} blocks among its children"
    )


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    """Full name of a module inside a model."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def reason(error: BaseException) -> str:
    """The first sentence of somebody else's error."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
