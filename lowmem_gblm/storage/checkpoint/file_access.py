"""The files that may be read: ordinary files that lie in the model folder.

A checkpoint is untrusted, and a link in it can point at anything on this machine: its target
would be read, and copied into the output. So a file is read only if, links followed, it lies

    in the model folder, wherever that is: the user named it, so it may be a link itself;
    in the `blobs` of the Hub cache that the model folder is a snapshot of
        (…/snapshots/REVISION/x.safetensors -> ../../blobs/HASH);
    in a folder that the user has allowed with the environment variable LOWMEM_GBLM_LINKS
        (several are joined by a colon, as in PATH).

A pipe or a device may block for ever, or never end: it is refused before it is opened.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lowmem_gblm.errors import CheckpointError, shown
from lowmem_gblm.storage.locking import MARK

ALLOWED = "LOWMEM_GBLM_LINKS"
RECORD = "pruning.json"
CARD = "README.md"
BASE_CARD = "README.base.md"
MARKER_FILE = "PRUNING-IN-PLACE"
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite",
}  # fmt: skip
_MARKS = {MARK, MARKER_FILE}
_SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def ordinary_file(folder: Path, path: Path) -> int:
    """Return the size in bytes of a file; raise `CheckpointError` unless it may be read."""
    try:
        real = Path(os.path.realpath(path, strict=True))
        found = os.stat(real)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{named(path)} {_why(path, error)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise CheckpointError(f"{named(path)} is {kind}, expected a file")
    if not os.access(real, os.R_OK):
        raise CheckpointError(f"{named(path)} may not be read by this user")
    if not any(real.is_relative_to(place) for place in _places(folder)):
        raise CheckpointError(
            f"{named(path)} is a link to {shown(real)}, outside the model folder: put a copy in "
            f"its place or, if you trust the link, set {ALLOWED}={shown(real.parent)}"
        )
    return found.st_size


def side_files(folder: Path) -> Iterator[Path]:
    """Yield all files but weights, such as config, tokenizer, generation config and licence.

    The record of the model's own pruning is left out, and what `all_files` leaves out.
    """
    return (path for path in all_files(folder) if not _is_no_side_file(path.name))


def all_files(folder: Path) -> Iterator[Path]:
    """Yield all files of a model folder.

    Left out are marks of this tool, caches, version control, folders that this tool writes or has
    written, and linked folders. Raises OSError if a folder is gone or cannot be listed: its files
    would be left out silently.
    """
    for place, folders, files in os.walk(folder, onerror=_not_listed):
        inside = [Path(place, name) for name in sorted(set(folders) - _SKIPPED_FOLDERS)]
        ours = (MARK, RECORD)
        folders[:] = [one.name for one in inside if not any((one / name).exists() for name in ours)]
        yield from (Path(place, name) for name in sorted(files) if name not in _MARKS)


def _not_listed(error: OSError) -> NoReturn:
    raise error


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, or is an index of them."""
    return name.endswith(".index.json") or Path(name).suffix in WEIGHT_SUFFIXES


def _is_no_side_file(name: str) -> bool:
    return is_weights(name) or name == RECORD


def named(path: Path) -> str:
    """Return a path for a message, its name as `shown`: that comes with the checkpoint."""
    return f"{path.parent}/{shown(path.name)}"


def _why(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if path.is_symlink():
        return f"is a link to {shown(os.readlink(path))}, which is missing"
    return "is missing"


def _places(folder: Path) -> list[Path]:
    home = Path(os.path.realpath(folder))
    places = [home]
    places += [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    allowed = os.environ.get(ALLOWED, "").split(os.pathsep)
    return places + [Path(os.path.realpath(one)) for one in allowed if one]
