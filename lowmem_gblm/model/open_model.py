"""Opening a model: headers, configuration, and the device and dtype of the computation."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_gblm.errors import CheckpointError, RequestError
from lowmem_gblm.model.from_config import read_or_describe
from lowmem_gblm.model.streamed_model import StreamedModel
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.runtime.accelerator import (
    choose_device,
    has_bfloat16,
    is_accelerator,
    settle_vector_math,
)
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.hub import is_on_hub, locate


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint and the meta model that fits it."""

    checkpoint: Checkpoint
    streamed: StreamedModel

    @property
    def folder(self) -> Path:
        """Return the folder of the checkpoint."""
        return self.checkpoint.folder

    @property
    def model_type(self) -> str:
        """Return the name that transformers has for the architecture of the text model."""
        return str(self.streamed.config.model_type)

    @property
    def positions(self) -> int | None:
        """Return the number of positions of the model; None if its configuration does not say."""
        found = getattr(self.streamed.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None


def open_model(
    model: str, resources: Resources, *, to_plan: bool = False, unfinished: bool = False
) -> OpenModel:
    """Return a model after reading headers and configuration; no weight is loaded.

    With `to_plan`, weights and device may be missing; with `unfinished`, the model may be one
    that is being pruned in place.

    Raises:
        CheckpointError: The model cannot be used.
        RequestError: The device does not exist.
        JobError: The model is being pruned in place, and that has not been finished.
    """
    settle_vector_math()
    trusted = resources.trust_remote_code
    if to_plan or is_on_hub(model):
        # An unusable model is refused before its weights are downloaded.
        folder = locate(model, weights=False, code=trusted)
        checkpoint = read_or_describe(folder, trust_remote_code=trusted)
    if not to_plan:
        checkpoint = Checkpoint(locate(model, code=trusted, unfinished=unfinished))
    device = choose_device(resources.device, must_be_here=not to_plan)
    dtype = choose_dtype(resources.dtype, checkpoint, device)
    streamed = StreamedModel(checkpoint, device, dtype, trust_remote_code=trusted)
    return OpenModel(checkpoint, streamed)


def check_tokens(opened: OpenModel, samples: Iterable[Tensor]) -> None:
    """Raise `CheckpointError` if a token id is beyond the vocabulary of the model."""
    largest = max(int(tokens.max()) for tokens in samples)
    known = int(opened.streamed.config.vocab_size)
    if largest >= known:
        raise CheckpointError(
            f"the tokenizer of {opened.checkpoint.folder} gives the token id {largest}, the model "
            f"has {known} tokens: they do not belong together"
        )


def choose_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: as asked, else the one of most of the checkpoint.

    CPUs multiply float16 some hundred times slower than float32, so float32 replaces it there.

    Raises:
        RequestError: float16 was asked for on a CPU.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if dtype == torch.float16 and not is_accelerator(device):
            raise RequestError("a CPU multiplies float16 too slowly: use --dtype float32")
        return dtype
    totals: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.nbytes
    most = max(totals, key=lambda dtype: totals[dtype], default=torch.float32)
    if most == torch.float16 and not is_accelerator(device):
        return torch.float32
    if most == torch.bfloat16 and not has_bfloat16(device):
        return torch.float16
    return most if most in (torch.float16, torch.bfloat16) else torch.float32
