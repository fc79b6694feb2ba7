"""The tensors that a checkpoint would hold, from config.json alone: to plan before a download.

Names, shapes and dtypes are those that `save_pretrained` writes, so a plan from config.json is the
plan from the headers.
"""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.conversion import as_stored
from lowmem_gblm.model.meta_model import FOREIGN_ERRORS, build_meta_model, load_config, reason
from lowmem_gblm.storage.checkpoint.header import TensorEntry
from lowmem_gblm.storage.checkpoint.reader import SINGLE, Checkpoint, lacks_weights


def read_or_describe(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Return the checkpoint as its headers say; as config.json says, if a shard is missing."""
    if lacks_weights(folder):
        return describe(folder, trust_remote_code=trust_remote_code)
    return Checkpoint(folder)


def describe(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Return the checkpoint that config.json describes, to plan with; tied weights are stored once.

    No other file is read, but for code that is trusted. Without a dtype in config.json it is
    float32: the larger one, and what transformers would build from it.
    """
    nothing = Checkpoint.described(folder, ())
    config = load_config(nothing, trust_remote_code=trust_remote_code)
    model = build_meta_model(nothing, _stored_dtype(config), trust_remote_code=trust_remote_code)
    tied = model.all_tied_weights_keys.keys()
    kept = {name: value for name, value in model.state_dict().items() if name not in tied}
    try:
        stored = as_stored(model, kept)
    except FOREIGN_ERRORS as error:
        raise UnsupportedModel(
            f"{type(model).__name__}: transformers cannot tell from config.json how its weights "
            f"are stored ({reason(error)}). Download them, then plan with that folder"
        ) from error
    entries = [
        TensorEntry(
            name=name,
            dtype=value.dtype,
            shape=tuple(value.shape),
            file=folder / SINGLE,
            offset=0,
            nbytes=value.nbytes,
        )
        for name, value in stored.items()
    ]
    return Checkpoint.described(folder, entries)


def _stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype that the weights are stored in, as far as config.json tells."""
    for one in (config, config.get_text_config()):
        if isinstance(one.dtype, torch.dtype):
            return one.dtype
    return torch.float32
