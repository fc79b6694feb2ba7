"""Statistics of a run, saved in a folder for later runs.

    DIR/
        block-00003.safetensors    the statistics of the matrices of block 3
        statistics.json            of which model, text and run they are; every file with its hash

The folder has its name only when it is complete (`pending_folder`).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.errors import CheckpointError, JobError, shown
from lowmem_gblm.storage.atomic import publish_json
from lowmem_gblm.storage.checkpoint.checksums import check_hashes, hash_violations
from lowmem_gblm.storage.checkpoint.header import TensorEntry, new_entry, read_header
from lowmem_gblm.storage.checkpoint.reader import read_tensor
from lowmem_gblm.storage.checkpoint.shard import publish_shard, tensor_data
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.locking import MARK
from lowmem_gblm.storage.pending_folder import PendingFolder, partial_folder
from lowmem_gblm.storage.raw_io import checked, file_pieces, summary

FORMAT = 2
_MANIFEST = "statistics.json"
# What a manifest holds, and what it says of the calibration samples.
_PARTS = {
    "streams": dict, "precision": str, "stored_precision": str, "calibration": dict,
    "identity": dict, "dropped_samples": list, "files": dict,
}  # fmt: skip
CALIBRATION = {
    "calibration": str, "text_column": str, "bos": str, "nsamples": int, "seqlen": int, "seed": int,
    "packing": bool,
}  # fmt: skip

# Of tensors: dtype and shape, by name.
TensorLayout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class StatisticsWriter:
    """Statistics that are being saved, and appear as the folder `final` when they are complete.

    `keep` are the files that earlier attempts of the job have finished. If `final` holds just them,
    an earlier attempt has published it, and nothing is left to do.
    """

    def __init__(self, final: Path, owner: str, keep: Mapping[str, dict[str, Any]]) -> None:
        self.bytes_written = 0
        self._files = dict(keep)
        self._folder = None
        if keep and _files_of(final) == keep:
            # The attempt may have been killed before it could remove the mark.
            (final / MARK).unlink(missing_ok=True)
        else:
            self._folder = PendingFolder(final, owner, keep, "--save-statistics")

    def write_block(
        self, index: int, layout: TensorLayout, tensors: Iterable[Tensor], check: Callable[[], None]
    ) -> None:
        """Publish the file of a block: `tensors` in the order of their `layout`, on any device.

        They are asked for one by one; `check` is called before each is written, and may raise.
        """
        assert self._folder is not None, "a step of a run whose statistics are published"
        path = self._folder.path / _file_name(index)
        entries = [new_entry(path, name, dtype, shape) for name, (dtype, shape) in layout.items()]
        pieces = checked(tensor_data(entries, tensors), check)
        holds = f"the statistics of block {index}"
        self._files[path.name] = publish_shard(path, entries, pieces, holds)
        self.bytes_written += self._files[path.name]["bytes"]

    def finished(self, blocks: Iterable[int]) -> dict[str, Any]:
        """Return the files of these written blocks, each with its summary, for the journal."""
        names = map(_file_name, blocks)
        return {name: self._files[name] for name in names if name in self._files}

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, and give the folder its name."""
        if self._folder is not None:
            files = dict(sorted(self._files.items()))
            content = {"format": FORMAT, **manifest, "files": files}
            publish_json(self._folder.path / _MANIFEST, content, "what the statistics are of")
            self._folder.publish()

    def close(self, *, keep: bool) -> None:
        """Stop writing; an unpublished folder is kept for another attempt, or removed."""
        if self._folder is not None:
            self._folder.close(keep=keep)


class StatisticsFolder:
    """Statistics that an earlier run has saved; what cannot be used raises a `JobError`.

    Attributes:
        manifest: What they are of, as `StatisticsWriter.publish` was given it.
        fingerprint: SHA-256 of the manifest, which has the hashes of all files.
        bytes_read: Bytes read so far, for hashes too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.fingerprint: str = summary(file_pieces(folder / _MANIFEST))["sha256"]
        self.bytes_read = 0
        self._entries: dict[str, TensorEntry] = {}

    def check(self, layout: TensorLayout) -> None:
        """Read all files; raise `JobError` unless they are as saved and hold what is needed."""
        try:
            for violation in hash_violations(self.folder, self.manifest["files"]):
                raise JobError(f"{self.folder} is damaged: {violation}. Save the statistics again")
            for name, file in self.manifest["files"].items():
                self._entries |= read_header(self.folder / name)
                self.bytes_read += file["bytes"]
        except CheckpointError as error:
            raise JobError(f"{self.folder} is damaged: {error}") from None
        for name, expected in layout.items():
            entry = self._entries.get(name)
            if entry is None:
                raise JobError(
                    f"{self.folder} has no statistic {shown(name)}: the run that saved it has not "
                    f"pruned that tensor. Give --include or --exclude as it did, or save the "
                    f"statistics again"
                )
            if (entry.dtype, entry.shape) != expected:
                raise JobError(
                    f"{self.folder} holds {shown(name)} as {entry.dtype} {list(entry.shape)}, "
                    f"expected {expected[0]} {list(expected[1])}: save the statistics again"
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor as it was saved, on the CPU; `check` comes first."""
        entry = self._entries[name]
        self.bytes_read += entry.nbytes
        return read_tensor(entry)


def holds_statistics(folder: Path) -> bool:
    """Return whether a folder holds complete statistics, as far as its manifest tells."""
    return (folder / _MANIFEST).is_file()


def remove_statistics(folder: Path) -> None:
    """Remove saved statistics, or what is left of them; files of others stay."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in [*folder.glob("block-*.safetensors"), folder / MARK]:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / _MANIFEST):
        unfinished = folder.name.endswith(".partial") or partial_folder(folder).exists()
        hint = "the run that saves them is unfinished: resume it" if unfinished else (
            "give a folder that prune --save-statistics has made"
        )  # fmt: skip
        raise JobError(f"{folder} holds no complete statistics, as {_MANIFEST} is missing: {hint}")
    try:
        found = read_json(folder / _MANIFEST)
        if found.get("format") != FORMAT:
            raise JobError(
                f"{folder} was saved in another format ({shown(found.get('format'))}, expected "
                f"{FORMAT}): use the version of lowmem-gblm that saved it, or save it again"
            )
        _check_types(found, _PARTS)
        _check_types(found["calibration"], CALIBRATION)
        check_hashes(found["files"])
    except (CheckpointError, ValueError) as error:
        raise JobError(f"{folder / _MANIFEST} is damaged: {error}") from None
    return found


def _check_types(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
    if wrong:
        raise ValueError(f"it lacks {', '.join(wrong)}")


def _files_of(folder: Path) -> Any:
    """Return the files that the manifest in a folder names; None if there is no manifest."""
    try:
        return read_json(folder / _MANIFEST).get("files")
    except CheckpointError:
        return None


def _file_name(block: int) -> str:
    return f"block-{block:05}.safetensors"
