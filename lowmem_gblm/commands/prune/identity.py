"""What identifies a job: everything that, if it were different, would give another result."""

import hashlib
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_gblm.commands.calibration import resolve_bos
from lowmem_gblm.commands.method_options import recorded_options
from lowmem_gblm.commands.paths import Paths
from lowmem_gblm.commands.pattern_rules import described
from lowmem_gblm.commands.prune.scope import PruneScope
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.options import options
from lowmem_gblm.runtime.accelerator import device_name
from lowmem_gblm.storage.checkpoint.file_access import RECORD
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.remote_code import configuration_hash
from lowmem_gblm.storage.in_place import overwritten_blocks

# Of these another version may compute other numbers; the samples are known by their tokens.
_COMPUTING = ("lowmem-gblm", "torch", "transformers", "bitsandbytes")
_PACKAGES = (*_COMPUTING, "safetensors", "accelerate", "tokenizers")
# What `_fingerprints` returns.
FINGERPRINTS = (
    "source_headers", "source_bytes", "source_config", "calibration_tokens", "held_out_tokens",
    "statistics_taken",
)  # fmt: skip

_TENSORS_SEEN = 500
_TENSORS_SEEN_OF_BLOCK = 8
_BYTES_SEEN = 512


def identity(
    scope: PruneScope, paths: Paths, samples_NT: Tensor, previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what, if it were different, would give another result.

    `previous` is the description of the job that is resumed, or None.
    """
    request, text = scope.request, scope.request.calibration_text
    found = asked_and_understood(scope)
    # Files are known by what is in them, wherever they lie.
    found["calibration"] = "a file" if Path(text).is_absolute() else text
    found |= _fingerprints(scope, samples_NT)
    found |= computing_versions()
    # Headers do not tell whether the model was pruned in place in the meantime.
    found["source_pruned"] = (scope.model.folder / RECORD).exists()
    if request.in_place:
        found["source_blocks"] = _blocks_seen(scope, paths, previous)
    if previous is not None and request.accept_other_rounding:
        found["device"] = previous["identity"].get("device")
    return found


def asked_and_understood(scope: PruneScope) -> dict[str, Any]:
    """Return what the user asked, what it was understood to mean, and on which device."""
    request, streamed = scope.request, scope.model.streamed
    asked = {
        one.name: getattr(request, one.name)
        for one in options(PruneRequest)
        if one.metadata["identity"]
    }
    understood = {
        **described(request.rules),
        "calibration": request.calibration_text,
        "bos": resolve_bos(request.bos, scope.model.model_type),
        "seqlen": scope.work.seqlen,
        "max_shard_size": None if request.in_place else request.shard_bytes,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "device": device_name(streamed.device),
        "dtype": str(streamed.dtype).removeprefix("torch."),
        # Wherever the folder lies.
        "save_statistics": request.save_statistics and request.save_statistics.name,
    }
    return {**asked, **recorded_options(request.options), **understood}


def recorded_identity(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return what pruning.json says of these parts of a job's identity, as far as it has them."""
    said = dict(record)
    for part in ("fingerprints", "versions"):
        said |= record.get(part) or {}
    return {name: said[name] for name in names if name in said}


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def computing_versions() -> dict[str, str]:
    """Return the versions of which another one may compute other numbers."""
    return {name: version for name, version in versions().items() if name in _COMPUTING}


def _fingerprints(scope: PruneScope, samples_NT: Tensor) -> dict[str, str | None]:
    """Return the SHA-256 of the model, of the samples and of the statistics that are taken.

    Tensors that are overwritten are not looked at. Where no sample is drawn, the samples are those
    of the statistics.
    """
    request, checkpoint = scope.request, scope.model.checkpoint
    gone = {name for block in scope.pruned_names for name in block if request.in_place}
    calibration_NT, held_out_NT = scope.split(samples_NT)
    tokens = _hash(calibration_NT)
    saved = scope.saved
    if saved is not None and not len(samples_NT):
        tokens = saved.manifest["identity"].get("calibration_tokens")
    return {
        **source_fingerprints(checkpoint, gone, trusted=request.trust_remote_code),
        "calibration_tokens": tokens,
        "held_out_tokens": _hash(held_out_NT) if len(held_out_NT) else None,
        "statistics_taken": None if saved is None else saved.fingerprint,
    }


def source_fingerprints(
    checkpoint: Checkpoint, but: Collection[str] = (), *, trusted: bool
) -> dict[str, str]:
    """Return the SHA-256 of what tells a model from others.

    Names, dtypes, shapes and places of all tensors count, and the first bytes of some hundreds of
    tensors, which differ between two models of one architecture, except those named. Python code
    of the model counts if it runs.
    """
    headers = hashlib.sha256()
    for entry in checkpoint.tensors.values():
        line = f"{entry.name} {entry.dtype} {entry.shape} {entry.file.name} {entry.offset}\n"
        headers.update(line.encode())
    return {
        "source_headers": headers.hexdigest(),
        "source_bytes": source_bytes(checkpoint, but),
        "source_config": configuration_hash(checkpoint.folder, trusted=trusted),
    }


def _hash(tokens_NT: Tensor) -> str:
    return hashlib.sha256(tokens_NT.contiguous().numpy().tobytes()).hexdigest()


def source_bytes(checkpoint: Checkpoint, but: Collection[str] = ()) -> str:
    """Return the SHA-256 of the first bytes of some hundreds of tensors, except those named."""
    names = [name for name in checkpoint.tensors if name not in but]
    return _fingerprint(checkpoint, names, _TENSORS_SEEN)


def _blocks_seen(scope: PruneScope, paths: Paths, previous: Mapping[str, Any] | None) -> list[str]:
    """Return what tells the blocks from others; of overwritten blocks, as they were before."""
    checkpoint = scope.model.checkpoint
    seen = [_fingerprint(checkpoint, names, _TENSORS_SEEN_OF_BLOCK) for names in scope.pruned_names]
    if previous is not None:
        former = previous["identity"]["source_blocks"]
        for index in overwritten_blocks(paths.work_folder):
            seen[index] = former[index]
    return seen


def _fingerprint(checkpoint: Checkpoint, names: Sequence[str], most: int) -> str:
    """Return the SHA-256 of the first bytes of at most so many tensors, evenly chosen."""
    names = [name for name in names if checkpoint.tensors[name].nbytes]
    seen = hashlib.sha256()
    for name in names[:: max(1, -(-len(names) // most))]:
        seen.update(checkpoint.first_bytes(name, _BYTES_SEEN))
    return seen.hexdigest()
