"""Writing pruned blocks over the dense ones, where there is no room for a second checkpoint.

    MODEL/PRUNING-IN-PLACE                     there until all is done (`in_place_marker`)
    MODEL/*.safetensors                        names, headers and sizes stay as they are
    MODEL.work/overwrites-00003.safetensors    the new values of the pruned tensors of block 3

A block takes four steps, each on the disk before the next one begins:

    1. its new tensors are published in the work folder
    2. the journal says that the step which has pruned it is done
    3. they are written over the old ones in the shards
    4. their file is removed

Killed before 2, a run finds the dense block unchanged, and prunes it again. From 2 on the step is
done and never repeated, and it is the last step that reads the block: the old tensors are not
needed any more, so 3 can be repeated as often as needed, and is repeated by the next run. Writing
raises OSError if the disk is full or failing, perhaps for a block before.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.errors import JobError, RequestError, shown
from lowmem_gblm.runtime.background import SerialWorker
from lowmem_gblm.storage.atomic import publish_file, publish_json
from lowmem_gblm.storage.checkpoint.file_access import (
    BASE_CARD,
    CARD,
    MARKER_FILE,
    RECORD,
    named,
)
from lowmem_gblm.storage.checkpoint.header import TensorEntry, read_header
from lowmem_gblm.storage.checkpoint.reader import Checkpoint
from lowmem_gblm.storage.checkpoint.shard import publish_shard, shard_summary, tensor_data
from lowmem_gblm.storage.checkpoint.writer import CheckpointWriter
from lowmem_gblm.storage.disk_errors import blamed
from lowmem_gblm.storage.hub import CACHED
from lowmem_gblm.storage.in_place_marker import remove_marker, write_marker
from lowmem_gblm.storage.job import Job
from lowmem_gblm.storage.job_state import how_to_start_over
from lowmem_gblm.storage.journal import read_journal
from lowmem_gblm.storage.raw_io import (
    PIECE_BYTES,
    checked,
    file_pieces,
    opened,
    read_at,
    summary,
    write_at,
)


class InPlaceWriter:
    """A checkpoint whose blocks are overwritten; a run uses it like a `CheckpointWriter`.

    Args:
        pruned: Names on disk of the tensors of every decoder block that are to be pruned.
        keep: Files of the work folder that the journal has; the remaining ones are written over the
            old tensors now, and any other such file is removed.

    Attributes:
        shards: All shards, each with its `bytes` and its `sha256`; empty before `write_rest`.
        bytes_written: Bytes written into the shards by this process.

    Raises:
        JobError: A file in `keep` is damaged, or the model was replaced in the meantime.
    """

    def __init__(
        self,
        source: Checkpoint,
        pruned: Sequence[Sequence[str]],
        job: Job,
        keep: Mapping[str, dict[str, Any]],
    ) -> None:
        self.shards: dict[str, dict[str, Any]] = {}
        self.bytes_written = 0
        self._source = source
        self._pruned = pruned
        self._job = job
        self._published: dict[str, dict[str, Any]] = {}
        self._check_overwritten(keep)
        write_marker(source.folder, job.folder, job.id, overwritten=bool(keep))
        self._repair(keep)
        self._writer = SerialWorker("write-block")

    def close(self, *, keep: bool) -> None:
        """Stop writing; the marker stays for another attempt to `keep`, or is removed."""
        self._writer.close()
        if not keep:
            remove_marker(self._source.folder)

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> Future[None]:
        """Publish the pruned tensors of block `index` as `CheckpointWriter.write_block` does."""
        return self._writer.begin(self._publish, index, dict(tensors))

    def settle(self) -> None:
        """Wait until the last block has been published."""
        self._writer.settle()

    def finished(self, blocks: Iterable[int]) -> dict[str, Any]:
        """Return the files of these published blocks, each with `bytes` and `sha256`."""
        return {name: self._published[name] for name in map(_file_name, blocks)}

    def committed(self, blocks: Sequence[int]) -> None:
        """Write these blocks, which the journal has, over the old ones; a next run repeats it."""
        job = self._job
        for name in map(_file_name, blocks):
            write_marker(self._source.folder, job.folder, job.id, overwritten=True)
            self._overwrite(job.folder / name)

    def write_rest(self, check: Callable[[], None]) -> None:
        """Read all shards for their hashes; `check` is called before every piece."""
        files = {entry.file.name: entry.file for entry in self._source.tensors.values()}
        self.shards = {
            name: summary(checked(file_pieces(file, "the shard"), check))
            for name, file in sorted(files.items())
        }
        self._source.bytes_read += self._source.nbytes()

    def publish(self, record: dict[str, Any], card: str) -> None:
        """Replace the card, write `record` as pruning.json, and remove the marker."""
        folder = self._source.folder
        _replace_card(folder, card)
        publish_json(folder / RECORD, record, "the record")
        remove_marker(folder)

    def _publish(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        entries = [self._source.tensors[name] for name in self._pruned[index]]
        path = self._job.folder / _file_name(index)
        holds = f"the new weights of block {index}"
        data = tensor_data(entries, (tensors[entry.name] for entry in entries))
        self._published[path.name] = publish_shard(path, entries, data, holds)

    def _check_overwritten(self, keep: Mapping[str, dict[str, Any]]) -> None:
        """Raise `JobError` unless blocks that were overwritten hold what was written."""
        for index, names in enumerate(self._pruned):
            name = _file_name(index)
            if name not in keep or (self._job.folder / name).exists():
                continue
            if shard_summary(self._source, names) != keep[name]:
                raise JobError(
                    f"{self._source.folder} is not the model that was being pruned: block {index} "
                    f"does not hold what was written over it. If the model was put back or fetched "
                    f"again, remove {self._source.folder / MARKER_FILE} and {self._job.folder} to "
                    f"start over"
                )

    def _repair(self, keep: Mapping[str, dict[str, Any]]) -> None:
        """Finish the writes over old tensors that an earlier run has begun."""
        for path in sorted(self._job.folder.glob(_file_name("*"))):
            if path.name not in keep:
                path.unlink()
                continue
            if summary(file_pieces(path, "the shard")) != keep[path.name]:
                why = "its checksum is not the one in the journal"
                raise _damaged(path, why, self._source.folder)
            self._overwrite(path)

    def _overwrite(self, path: Path) -> None:
        """Write all tensors of a file over those of the same names, then remove the file."""
        with ExitStack() as stack:
            new = stack.enter_context(opened(path))
            shards: dict[Path, int] = {}
            for name, entry in read_header(path).items():
                target = self._source.tensors[name]
                if target.file not in shards:
                    shards[target.file] = stack.enter_context(opened(target.file, os.O_WRONLY))
                _copy(new, entry, shards[target.file], target)
                self.bytes_written += entry.nbytes
            for file, shard in shards.items():
                with blamed(file, "the shard"):
                    os.fsync(shard)
        path.unlink()


# Either kind of output that a run writes to.
BlockWriter = CheckpointWriter | InPlaceWriter


def check_confirmed(model: str, *, confirmed: bool) -> None:
    """Raise `RequestError` unless MODEL is a folder and the user has confirmed the overwriting."""
    if not Path(model).is_dir():
        raise RequestError(
            f"--in-place overwrites a model folder, and {model} is none: download the "
            f"model into a folder of yours (hf download MODEL --local-dir FOLDER), and give that"
        )
    if not confirmed:
        raise RequestError(
            f"--in-place overwrites the weights in {model}, block by block: the dense "
            f"model is gone then, and a run that is interrupted leaves a folder that is good for "
            f"nothing until the run has been resumed and finished. If that is what you want, type "
            f"--in-place --overwrite-my-only-copy"
        )


def check_overwritable(source: Checkpoint, names: Iterable[str], *, shared: bool) -> None:
    """Raise `RequestError` if the shards of tensors should not or cannot be overwritten.

    If `shared`, other users may be reading the shards, too.
    """
    for file in sorted({source.tensors[name].file for name in names}):
        also = _elsewhere(file)
        if also and not shared:
            raise RequestError(
                f"{named(file)} {also}: --in-place would prune it for whoever else uses it, too. "
                f"Give a copy of the model; or add --in-place-shared, if no one else needs it"
            )
        _check_writable(file)
    _check_writable(source.folder)


def overwritten_blocks(work_folder: Path) -> list[int]:
    """Return the blocks of which the journal of a job has the new tensors."""
    entries = read_journal(work_folder, how_to_start_over(work_folder, in_place=True))
    names = [name for entry in entries for name in entry["shards"]]
    return sorted(int(Path(name).stem.removeprefix("overwrites-")) for name in names)


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise RequestError(
            f"{named(path)} may not be written to by this user, and --in-place has to: change its "
            f"permissions, or give an OUTPUT folder instead"
        )


def _elsewhere(file: Path) -> str | None:
    """Return where else a file is in use, as far as this process can see; None if nowhere."""
    real = Path(os.path.realpath(file))
    if file.is_symlink():
        return f"is a symbolic link to {shown(real)}"
    if any(part.startswith(CACHED) for part in real.parts):
        return "lies in a cache of the Hub"
    names = real.stat().st_nlink
    return f"has {names} names (hard links)" if names > 1 else None


def _replace_card(folder: Path, text: str) -> None:
    """Write a card, and keep the one that is there; do nothing if it is this one already."""
    card, content = folder / CARD, text.encode()
    if card.is_file():
        if card.read_bytes() == content:
            return
        publish_file(folder / BASE_CARD, file_pieces(card), "the card of the model", replaces=True)
    publish_file(card, [content], "the model card", replaces=True)


def _file_name(block: int | str) -> str:
    number = f"{block:05}" if isinstance(block, int) else block
    return f"overwrites-{number}.safetensors"


def _damaged(file: Path, why: str, model: Path) -> JobError:
    return JobError(
        f"{file} is damaged: {why}. It holds what was being written over weights in {model}, which "
        f"cannot be finished without it: look at the disk, and fetch the model anew"
    )


def _copy(source: int, entry: TensorEntry, target: int, place: TensorEntry) -> None:
    assert entry.nbytes == place.nbytes, entry.name
    for start in range(0, entry.nbytes, PIECE_BYTES):
        piece = memoryview(bytearray(min(PIECE_BYTES, entry.nbytes - start)))
        with blamed(entry.file):
            count = read_at(source, piece, entry.offset + start)
        if count < len(piece):
            raise _damaged(entry.file, "it has become shorter", place.file.parent)
        with blamed(place.file, "the shard"):
            write_at(target, piece, place.offset + start)
