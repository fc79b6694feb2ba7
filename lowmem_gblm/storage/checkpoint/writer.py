"""Writing the pruned checkpoint: shards of complete blocks, side files, index, then one rename.

Everything is written to `OUTPUT.partial/`, where a shard has its name when it is complete. Which
blocks a shard holds, and where, is known up front, so blocks may come in any order and are never
moved. Writing raises OSError if the disk is full or failing, perhaps for a block before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lowmem_gblm.planning.sizes import slices_within
from lowmem_gblm.runtime.background import SerialWorker
from lowmem_gblm.storage.atomic import publish_file, publish_json
from lowmem_gblm.storage.checkpoint.file_access import (
    BASE_CARD,
    CARD,
    RECORD,
    ordinary_file,
    side_files,
)
from lowmem_gblm.storage.checkpoint.header import TensorEntry
from lowmem_gblm.storage.checkpoint.reader import INDEX, SINGLE, Checkpoint
from lowmem_gblm.storage.checkpoint.shard import PendingShard, tensor_data
from lowmem_gblm.storage.pending_folder import PendingFolder, partial_folder
from lowmem_gblm.storage.raw_io import Bytes, checked, file_pieces


class CheckpointWriter:
    """A checkpoint that is being written, and appears as the folder `final` when it is complete.

    Args:
        blocks: Names on disk of the tensors of every decoder block.
        order: The blocks in the order in which they are written.
        shard_bytes: Most that the blocks of a shard take; a larger block has a shard of its own.
        owner: The job, as `storage.job.check_partial` reads it from the mark.
        keep: The shards as earlier attempts have noted them; all other files they left are removed.

    Raises:
        JobError: `final` exists, or what earlier attempts have written is not there any more.
    """

    def __init__(
        self,
        final: Path,
        source: Checkpoint,
        blocks: Sequence[Sequence[str]],
        order: Sequence[int],
        shard_bytes: int,
        owner: str,
        keep: Mapping[str, dict[str, Any]],
    ) -> None:
        self.bytes_written = 0
        self._source = source
        in_blocks = {name for names in blocks for name in names}
        # What no block holds is written last, as if it were one more block.
        self._rest = len(blocks)
        self._parts = [*blocks, [name for name in source.tensors if name not in in_blocks]]
        self._shard_of = self._layout(partial_folder(final), [*order, self._rest], shard_bytes)
        self._finished: dict[int, dict[str, Any]] = {}
        begun = [shard for shard in self._shards if shard.path.name in keep]
        files = {shard.file.name: {"bytes": shard.nbytes} for shard in begun}
        self._folder = PendingFolder(final, owner, files)
        try:
            for shard in begun:
                shard.take_over(keep[shard.path.name])
        except BaseException:
            self._folder.close(keep=True)
            raise
        self._writer = SerialWorker("write-block")

    @property
    def shards(self) -> dict[str, Any]:
        """Return all shards, each with the `bytes` and the `sha256` of what is written."""
        return {shard.path.name: shard.written for shard in self._shards}

    def close(self, *, keep: bool) -> None:
        """Stop writing; an unpublished output is kept for another attempt, or removed."""
        self._writer.close()
        self._folder.close(keep=keep)

    def finished(self, blocks: Iterable[int]) -> dict[str, Any]:
        """Return the shards of these blocks, as they were after each of them, for the journal."""
        return {name: shard for index in blocks for name, shard in self._finished[index].items()}

    def write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> Future[None]:
        """Write decoder block `index` to the disk in a thread; return the future of that.

        `tensors` are on the CPU, dtypes as in the source, and unmodified until the future is done.
        """
        return self._writer.begin(self._write_block, index, dict(tensors))

    def settle(self) -> None:
        """Wait until the last block has been written."""
        self._writer.settle()

    def committed(self, blocks: Iterable[int]) -> None:
        """Do nothing: once the journal has these blocks, they are final."""

    def write_rest(self, check: Callable[[], None]) -> None:
        """Write all other tensors and the side files; `check` may raise to stop."""
        self.settle()
        pieces = chain.from_iterable(map(self._source.pieces, self._parts[self._rest]))
        self._write_part(self._rest, checked(pieces, check))
        for path, name in _copies(self._source.folder):
            copy = self._folder.path / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            publish_file(copy, checked(file_pieces(path), check))

    def publish(self, record: dict[str, Any], card: str) -> None:
        """Write the card, `record` as pruning.json, then the index; rename the folder."""
        folder = self._folder.path
        publish_file(folder / CARD, [card.encode()], "the model card")
        publish_json(folder / RECORD, record, "the record")
        if len(self._shards) > 1:
            publish_json(folder / INDEX, self._index(), "the index")
        self._folder.publish()

    @property
    def _shards(self) -> list[PendingShard]:
        return list(dict.fromkeys(self._shard_of.values()))

    def _layout(
        self, folder: Path, order: Sequence[int], shard_bytes: int
    ) -> dict[int, PendingShard]:
        """Return the shard of every part."""
        groups = slices_within([self._source.nbytes(names) for names in self._parts], shard_bytes)
        found: dict[int, PendingShard] = {}
        for number, group in enumerate(groups, start=1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            path = folder / (name if len(groups) > 1 else SINGLE)
            parts = {part: self._entries(part) for part in group}
            shard = PendingShard(path, parts, [part for part in order if part in parts])
            found |= dict.fromkeys(group, shard)
        return found

    def _entries(self, part: int) -> list[TensorEntry]:
        return [self._source.tensors[name] for name in self._parts[part]]

    def _index(self) -> dict[str, Any]:
        weight_map = {
            name: self._shard_of[part].path.name
            for part, names in enumerate(self._parts)
            for name in names
        }
        return {
            "metadata": {"total_size": self._source.nbytes()},
            "weight_map": dict(sorted(weight_map.items())),
        }

    def _write_block(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        entries = self._entries(index)
        self._write_part(index, tensor_data(entries, (tensors[entry.name] for entry in entries)))

    def _write_part(self, part: int, data: Iterable[Bytes]) -> None:
        shard = self._shard_of[part]
        before = shard.written["bytes"]
        shard.write(part, data)
        self._finished[part] = {shard.path.name: shard.written}
        self.bytes_written += shard.written["bytes"] - before


def _copies(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the side files of a model, each with its name in an output.

    The card of the model makes room for that of the output; the card of its own base stays behind.
    """
    for path in side_files(folder):
        ordinary_file(folder, path)
        name = path.relative_to(folder)
        if name == Path(CARD):
            yield path, Path(BASE_CARD)
        elif name != Path(BASE_CARD) or not (folder / CARD).exists():
            yield path, name
