"""Checks of what config.json declares against the headers, before memory of that size is taken.

A config.json of a few hundred bytes can ask for a thousand million blocks, or for tables of sines
as large as the machine. The headers, checked against the files, tell the size of the model.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lowmem_gblm.errors import CheckpointError, UnsupportedModel, shown, shown_value
from lowmem_gblm.model.conversion import NameConversion
from lowmem_gblm.storage.checkpoint.header import TensorEntry
from lowmem_gblm.storage.checkpoint.reader import Checkpoint

# Endings of names in config.json, and the most that is accepted: far beyond every known model,
# as the largest have 130 blocks, 512 experts, 22000 labels and ten million positions.
_MOST = (
    (re.compile(r"(layers?|blocks?|depth)$"), 2000),
    (re.compile(r"(experts|labels|types|heads|stages|levels|codebooks)$"), 100_000),
    (re.compile(r"(positions|position_embeddings|seq_len|seq_length|ctx)$"), 1 << 27),
)
# Buffers that a model computes for itself may take this much, or as much as its weights.
MAX_BUFFER_BYTES = 1 << 30


def check_counts(path: Path, raw: dict[str, Any]) -> None:
    """Raise `CheckpointError` if config.json has more blocks, experts or labels than any model."""
    # Values that are left to look at, with the nearest name above each.
    pending: list[tuple[str, Any]] = [("", raw)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend((name, one) for one in value)
        elif isinstance(value, int):
            most = next((most for ending, most in _MOST if ending.search(name)), value)
            if value > most:
                raise CheckpointError(
                    f"{path} says {shown(name)} is {shown(value)}, expected at most {most}"
                )


def check_sizes(path: Path, config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Raise unless the sizes of a model are numbers, and its depth fits the number of tensors."""
    text = config.get_text_config()
    for name in ("hidden_size", "vocab_size"):
        size = getattr(text, name, None)
        if type(size) is not int or size < 1:
            raise UnsupportedModel(
                f"{path} gives the model the {name} {shown_value(size)}, expected a number from 1"
            )
    depth = getattr(text, "num_hidden_layers", None)
    if type(depth) is not int:
        raise UnsupportedModel(
            f"{path} gives the model the num_hidden_layers {shown_value(depth)}, expected a number"
        )
    tensors = len(checkpoint.tensors)
    if checkpoint.on_disk and depth > tensors:
        raise CheckpointError(
            f"{path} says there are {depth} decoder blocks, more than there are tensors: {tensors}"
        )


def check_headers(model: PreTrainedModel, prefix: str, checkpoint: Checkpoint) -> None:
    """Raise unless every parameter of a model on `meta` fits the headers, if there are any.

    `prefix` is the name of the list of decoder blocks. Buffers may not be larger than the weights.
    """
    if checkpoint.on_disk:
        conversion, state = NameConversion(model), model.state_dict()
        for name, target in conversion.taken_over(checkpoint.tensors).items():
            _check_tensor(checkpoint.tensors[name], state[target])
        found = set(filter(None, conversion.in_module(checkpoint.tensors).values()))
        _check_complete(model, prefix, conversion, found, checkpoint.folder)
    own = sum(buffer.nbytes for buffer in model.buffers())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if own > max(weights, MAX_BUFFER_BYTES):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json asks for tables of {own} bytes beside weights of "
            f"{weights} bytes"
        )


def _check_tensor(entry: TensorEntry, expected: Tensor) -> None:
    where = f"tensor {shown(entry.name)} in {entry.file}"
    if entry.shape != expected.shape:
        raise CheckpointError(
            f"{where} has the shape {list(entry.shape)}, the architecture expects "
            f"{list(expected.shape)}"
        )
    if expected.is_floating_point() and not entry.dtype.is_floating_point:
        raise CheckpointError(
            f"{where} holds {entry.dtype}, expected floating-point numbers: if it is quantized, "
            f"prune the original checkpoint, then quantize the result"
        )
    if expected.numel() == 0:
        raise CheckpointError(f"{where} holds no numbers: its shape is {list(entry.shape)}")


def _check_complete(
    model: PreTrainedModel, prefix: str, conversion: NameConversion, found: set[str], folder: Path
) -> None:
    """Raise unless every parameter has a tensor, or is tied to or split off one that exists."""
    tied = model.all_tied_weights_keys
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in found and tied.get(name) not in found and not conversion.is_split_off(name)
    ]
    for name in missing:
        block = re.match(rf"{re.escape(prefix)}\.\d+\.", name)
        if block and not any(one.startswith(block.group()) for one in found):
            index = block.group().split(".")[-2]
            raise CheckpointError(f"{folder} has no tensor of decoder block {index}")
        raise CheckpointError(f"{folder} lacks the tensor for {name} ({len(missing)} such tensors)")
