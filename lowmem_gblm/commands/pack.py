"""Checkpoints without their zeros, for storage and transfer: packed, and unpacked byte for byte.

    PACKED/
        model-00001-of-00031.packed.safetensors    a shard, as `packed_shard` describes it
        config.json, …                             every other file as it is
        packed.json                                bytes and SHA-256 of every file before

No loader takes a packed folder for a model: the shards do not have the names of shards. A folder
has its name only when it is complete (`pending_folder`); a killed attempt is started over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_gblm.commands.pruned_record import read_record
from lowmem_gblm.errors import CheckpointError, JobError, RequestError, shown
from lowmem_gblm.runtime.progress import Listener, Progress, Stage
from lowmem_gblm.runtime.signals import StopFlag, stop_on_signals
from lowmem_gblm.storage.atomic import publish_file, publish_json
from lowmem_gblm.storage.checkpoint.checksums import is_summary
from lowmem_gblm.storage.checkpoint.file_access import RECORD, all_files, ordinary_file
from lowmem_gblm.storage.checkpoint.packed_shard import (
    SUFFIX,
    PackedShard,
    pack_shard,
    unpacked_pieces,
)
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.disk_errors import explained
from lowmem_gblm.storage.hub import locate
from lowmem_gblm.storage.locking import model_lock, owner_of
from lowmem_gblm.storage.pending_folder import PendingFolder, partial_folder
from lowmem_gblm.storage.raw_io import checked, file_pieces

FORMAT = 1
_MANIFEST = "packed.json"
_SHARD = ".safetensors"
_OWNER = "pack"
_CREATED = {"pack": "PACKED", "unpack": "OUTPUT"}


def pack(output: str, packed: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Write the checkpoint `output` without its zeros to the new folder `packed`.

    Args:
        output: Folder or Hub id of any safetensors checkpoint.
        packed: Folder to create.
        listener: Called after every shard.

    Returns:
        `output`, `packed`, `files`, `tensors`, `masked_tensors` (those stored as mask and values),
        `bytes` and `packed_bytes` (of shards).

    Raises:
        CheckpointError: A shard cannot be read, or is not that of pruning.json.
        JobError: `packed` exists.
        DiskFull, DiskError: The disk was full or failing; nothing is left.
    """
    folder = locate(output)
    files = _files(folder)
    shards = [name for name in files if _is_shard(name)]
    if not shards:
        raise CheckpointError(f"{folder} holds no safetensors that could be packed")
    if _MANIFEST in files:
        raise RequestError(f"{folder} is packed already: give the folder that it was made from")
    recorded = read_record(folder).get("shards", {}) if RECORD in files else {}
    manifest: dict[str, Any] = {}
    done: list[PackedShard] = []
    with model_lock(folder, alone=False), _new(packed, "pack", len(shards), listener) as new:
        for name, path in files.items():
            if _is_shard(name):
                done.append(pack_shard(path, new.file(_packed_name(name)), new.progress.check))
                manifest[name] = done[-1].original
                _check_recorded(path, manifest[name], recorded.get(name))
                new.progress.step()
            else:
                ordinary_file(folder, path)
                pieces = checked(file_pieces(path), new.progress.check)
                manifest[name] = publish_file(new.file(name), pieces)
        content = {"format": FORMAT, "files": manifest}
        publish_json(new.file(_MANIFEST), content, "what is packed")
    return {
        "output": output,
        "packed": str(packed),
        "files": len(files),
        "tensors": sum(shard.tensors for shard in done),
        "masked_tensors": sum(shard.masked for shard in done),
        "bytes": sum(shard.original["bytes"] for shard in done),
        "packed_bytes": sum(shard.packed["bytes"] for shard in done),
    }


def unpack(packed: str, output: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Write the checkpoint that was packed to `packed` to the new folder `output`, byte for byte.

    Args:
        packed: Folder made by `pack`, or a Hub id of one.
        output: Folder to create.
        listener: Called after every shard.

    Returns:
        `packed`, `output`, `files` and `bytes` (of all of them).

    Raises:
        CheckpointError: A file is missing or damaged: no `output` is left.
        JobError: `output` exists.
        DiskFull, DiskError: The disk was full or failing; nothing is left.
    """
    folder = locate(packed)
    manifest = _read_manifest(folder)
    # Names of the manifest are untrusted: only files that are in the folder are read or written.
    found = _files(folder)
    missing = [name for name in manifest if _packed_name(name) not in found]
    if missing:
        raise CheckpointError(f"{folder} lacks {shown(_packed_name(missing[0]))}: fetch it again")
    shards = sum(map(_is_shard, manifest))
    with _new(output, "unpack", shards, listener) as new:
        for name, expected in manifest.items():
            path = found[_packed_name(name)]
            ordinary_file(folder, path)
            shard = _is_shard(name)
            pieces = unpacked_pieces(path, expected["bytes"]) if shard else file_pieces(path)
            written = publish_file(new.file(name), checked(pieces, new.progress.check))
            if written != expected:
                raise CheckpointError(
                    f"{path} is damaged: it gives {written['bytes']} bytes with the SHA-256 "
                    f"{written['sha256']}, {_MANIFEST} says {expected['bytes']} with "
                    f"{expected['sha256']}: fetch it again, or pack again"
                )
            if shard:
                new.progress.step()
    return {
        "packed": packed,
        "output": str(output),
        "files": len(manifest),
        "bytes": sum(one["bytes"] for one in manifest.values()),
    }


class _NewFolder(NamedTuple):
    """A folder that is being written, and how far the work is."""

    path: Path
    progress: Progress

    def file(self, name: str) -> Path:
        """Return where to write a file, in a folder that exists."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def _new(final: Path, verb: str, shards: int, listener: Listener | None) -> Iterator[_NewFolder]:
    """Run the body with a folder that is called `final` afterwards; after an error none is left."""
    partial, option = partial_folder(final), _CREATED[verb]
    if owner_of(partial) not in ("", _OWNER):
        raise JobError(
            f"{partial} belongs to an unfinished run of prune: resume that, or choose another "
            f"{option}"
        )
    stop = StopFlag()
    progress = Progress([Stage(name=verb, steps=shards, cost=1)], listener, stop)
    try:
        pending = PendingFolder(final, _OWNER, keep={}, option=option)
        try:
            with stop_on_signals(stop), progress.stage(verb):
                yield _NewFolder(pending.path, progress)
            pending.publish()
        finally:
            pending.close(keep=False)
    except OSError as error:
        raise explained(error, "", "give the same command again") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the size and hash of every file that was packed, by its name before."""
    if not (folder / _MANIFEST).exists():
        raise CheckpointError(f"{folder} has no {_MANIFEST}: give a folder that pack has made")
    manifest = read_json(folder / _MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is packed in another format ({shown(manifest.get('format'))}, expected "
            f"{FORMAT}): unpack it with the version of lowmem-gblm that has packed it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or not all(map(is_summary, files.values())):
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: it does not describe files")
    return files


def _check_recorded(path: Path, found: dict[str, Any], recorded: dict[str, Any] | None) -> None:
    if recorded is not None and found != recorded:
        raise CheckpointError(
            f"{path} has the SHA-256 {found['sha256']}, {RECORD} says otherwise: the checkpoint is "
            f"damaged, see lowmem-gblm verify {path.parent}"
        )


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in all_files(folder)}


def _is_shard(name: str) -> bool:
    return name.endswith(_SHARD)


def _packed_name(name: str) -> str:
    """Return what a file is called when it is packed."""
    return name.removesuffix(_SHARD) + SUFFIX if _is_shard(name) else name
