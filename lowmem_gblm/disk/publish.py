"""The only file that renames.

A file or folder appears under its final name whole or not at all: it is written beside it under a
temporary name, flushed to the disk, renamed, and the folder is flushed too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"


def publish_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create `path` with what `write` puts into the open file.

    Raises:
        FileExistsError: `path` exists; nothing is ever overwritten.
        OSError: The disk is full or failing; the temporary file is removed.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    _flush_folder(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """Create `path` as readable JSON, in the key order of `value`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    publish_file(path, lambda file: file.write(text.encode()))


def publish_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its final name.

    Raises:
        FileExistsError: `final` exists.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    _flush_folder(partial)
    os.rename(partial, final)
    _flush_folder(final.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
