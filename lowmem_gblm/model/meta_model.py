"""A model on `meta` from the configuration of a checkpoint."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from lowmem_gblm.errors import CheckpointError, UnsupportedModel, first_line, shown, shown_value
from lowmem_gblm.model.config_checks import check_counts, check_headers, check_sizes
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.remote_code import check_remote_code
from lowmem_gblm.storage.checkpoint.strict_json import read_json

MAX_CONFIG_BYTES = 4 << 20
_OWN_CLASS = AutoModelForCausalLM.__name__

# What transformers raises if config.json makes no sense, or if a model cannot run around stubs.
# A device error may be any of these: ask `is_device_error` first.
FOREIGN_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    ImportError, NameError, OSError, RuntimeError, StrictDataclassError, SyntaxError,
)  # fmt: skip


def build_meta_model(
    checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model of a checkpoint with every parameter on `meta`, in eval mode.

    It is built twice: first with its buffers on `meta`, too, which takes no memory whatever the
    configuration asks for; then, only if that fits the headers, with real buffers.
    """
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    with torch.device("meta"), no_init_weights():
        twin = _build(config, dtype, trust_remote_code)
    check_headers(twin, find_layers(twin)[0], checkpoint)
    with init_empty_weights(include_buffers=False):
        model = _build(config, dtype, trust_remote_code)
    model.set_experts_implementation("eager")
    # Router logits would be gathered from blocks that are not there.
    model.config.output_router_logits = False
    # Mixtral's router adds noise in train mode.
    model.eval()
    return model


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a checkpoint, if it asks for no more than that can hold."""
    path = checkpoint.folder / "config.json"
    raw = read_json(path, MAX_CONFIG_BYTES)
    check_remote_code(path, raw, trusted=trust_remote_code)
    _check_quantized(checkpoint.folder, raw)
    check_counts(path, raw)
    kind = shown_value(raw.get("model_type"))
    with _refused(f"transformers can make nothing of {path} (model_type {kind})"):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    check_sizes(path, config, checkpoint)
    return config


def _check_quantized(folder: Path, raw: dict[str, Any]) -> None:
    quantization = raw.get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{folder} is quantized ({shown(kind) if isinstance(kind, str) else 'unknown kind'}): "
            f"prune the original checkpoint, then quantize the result"
        )


def _build(
    config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Build a model with default attention and experts: config.json may name code on the Hub."""
    with _refused(
        f"{config.model_type!r} is not a decoder-only language model that transformers can build "
        f"from this config.json"
    ):
        build = partial(AutoModelForCausalLM.from_config, trust_remote_code=False)
        if trust_remote_code and _OWN_CLASS in getattr(config, "auto_map", {}):
            # `from_config` would take the code that it has seen first in this process.
            own = get_class_from_dynamic_module(config.auto_map[_OWN_CLASS], config.name_or_path)
            build = own._from_config
        return build(config, dtype=dtype, attn_implementation=None, experts_implementation=None)


@contextmanager
def _refused(sentence: str) -> Iterator[None]:
    """Run the body; what transformers raises becomes the reason that ends the sentence."""
    # Its warnings say the same as its exceptions, and are not shown.
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FOREIGN_ERRORS as error:
        raise UnsupportedModel(f"{sentence}: {reason(error)}") from None
    finally:
        transformers_logging.set_verbosity(level)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of decoder blocks, after its name; raise `UnsupportedModel` without one."""
    kind = type(model).__name__
    with _refused(f"{kind} has no decoder"):
        decoder = model.get_decoder()
    depth = model.config.get_text_config().num_hidden_layers
    if depth < 1:
        raise UnsupportedModel(f"{kind} is said to have {depth} decoder blocks")
    children = set(decoder.children())
    for name, module in model.named_modules():
        if module in children and isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise UnsupportedModel(
        f"{kind} is not built like a decoder-only language model: its decoder has "
        f"no list of {depth} blocks among its children"
    )


def reason(error: BaseException) -> str:
    """Return the first sentence of an error that another library raised."""
    return first_line(error).split(". ")[0]
