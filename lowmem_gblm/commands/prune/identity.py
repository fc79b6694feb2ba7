"""What identifies a job: everything that, if it were different, would give another result."""

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.commands.calibration import NAMED
from lowmem_gblm.commands.method_options import recorded_options
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.model.open_model import OpenModel
from lowmem_gblm.options import options
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.remote_code import configuration_hash

_PACKAGES = (
    "lowmem-gblm",
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "tokenizers",
    "bitsandbytes",
)
# Of these another version may compute other numbers; the samples are known by their tokens.
_COMPUTING = ("lowmem-gblm", "torch", "transformers", "bitsandbytes")

_TENSORS_SEEN = 500
_TENSORS_SEEN_OF_BLOCK = 8
_BYTES_SEEN = 512


def identity(request: PruneRequest, opened: OpenModel, seqlen: int) -> dict[str, Any]:
    """Return what the user asked, what it was understood to mean, and on which device."""
    asked = {
        one.name: getattr(request, one.name)
        for one in options(PruneRequest)
        if one.metadata["identity"]
    }
    understood = {
        "sparsity": float(request.target.sparsity),
        "pattern": str(request.target),
        "calibration": request.calibration_text,
        "seqlen": seqlen,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "device": device_name(opened.streamed.device),
        "dtype": str(opened.streamed.dtype).removeprefix("torch."),
    }
    return {**asked, **recorded_options(request.options), **understood}


def recorded_identity(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return what pruning.json says of these parts of a job's identity, as far as it has them."""
    said = dict(record)
    for part in ("fingerprints", "versions"):
        said |= record.get(part) or {}
    return {name: said[name] for name in names if name in said}


def computing_versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {name: version for name, version in versions().items() if name in _COMPUTING}


def versions() -> dict[str, str]:
    """Return the versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def fingerprints(
    checkpoint: Checkpoint,
    samples_NT: Tensor,
    *,
    overwritten: Iterable[Iterable[str]] = (),
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Return the SHA-256 of the model and of the samples.

    Names, dtypes, shapes and places of all tensors count, and the first bytes of some hundreds of
    tensors, which differ between two models of one architecture.

    Args:
        overwritten: Names of tensors of every block that are overwritten, and so not looked at.
        trust_remote_code: Whether Python code of the model runs, and counts.
    """
    source = hashlib.sha256()
    for entry in checkpoint.tensors.values():
        line = f"{entry.name} {entry.dtype} {entry.shape} {entry.file.name} {entry.offset}\n"
        source.update(line.encode())
    gone = {name for block in overwritten for name in block}
    names = [name for name in checkpoint.tensors if name not in gone]
    samples = hashlib.sha256(samples_NT.contiguous().numpy().tobytes())
    return {
        "source_headers": source.hexdigest(),
        "source_bytes": _fingerprint(checkpoint, names, _TENSORS_SEEN),
        "source_config": configuration_hash(checkpoint.folder, trusted=trust_remote_code),
        "calibration_tokens": samples.hexdigest(),
    }


def block_fingerprints(checkpoint: Checkpoint, blocks: Iterable[Sequence[str]]) -> list[str]:
    """Return for every block the SHA-256 of the first bytes of some of the named tensors."""
    return [_fingerprint(checkpoint, names, _TENSORS_SEEN_OF_BLOCK) for names in blocks]


def _fingerprint(checkpoint: Checkpoint, names: Sequence[str], most: int) -> str:
    """Return the SHA-256 of the first bytes of at most so many tensors, evenly chosen."""
    names = [name for name in names if checkpoint.tensors[name].nbytes]
    seen = hashlib.sha256()
    for name in names[:: max(1, -(-len(names) // most))]:
        seen.update(checkpoint.first_bytes(name, _BYTES_SEEN))
    return seen.hexdigest()


def text_name(request: PruneRequest) -> str:
    """Return the data set that samples come from, if they do not come from a file."""
    return request.calibration_text if request.calibration_text in NAMED else "a file"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
