"""Calibration samples that a job keeps, because no name of a text leads to them again."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lowmem_gblm.errors import JobError, first_line
from lowmem_gblm.storage.atomic import publish_file

SAMPLES = "samples.safetensors"
_TOKENS = "tokens"


def keep_samples(folder: Path, tokens_NT: Tensor) -> None:
    """Write samples, int64 [N, T], into the work folder of a job, unless they are there."""
    if not (folder / SAMPLES).exists():
        content = save({_TOKENS: tokens_NT.contiguous()})
        publish_file(folder / SAMPLES, [content], "the calibration samples")


def kept_samples(folder: Path) -> Tensor:
    """Return the samples, int64 [N, T], in the work folder of a job; raise `JobError` if none."""
    try:
        return load_file(folder / SAMPLES)[_TOKENS]
    except (OSError, SafetensorError, KeyError) as error:
        raise JobError(
            f"the calibration samples of the job in {folder} cannot be read "
            f"({first_line(error)}): call prune once more with the calibration it was begun with"
        ) from None
