"""Python code that comes with a checkpoint: it can do whatever the user can do.

It runs only where the user has said so, and only if it lies in the model folder, where it can be
read before and where it becomes part of the output.
"""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import UnsupportedModel, shown, shown_value
from lowmem_gblm.storage.checkpoint.file_access import ordinary_file, side_files

PATTERN = "*.py"
_AUTO_MAP = "auto_map"


def check_remote_code(path: Path, content: Mapping[str, Any], *, trusted: bool) -> None:
    """Raise unless all code may run that `content`, the configuration in file `path`, asks for."""
    if _AUTO_MAP not in content:
        return
    if not trusted:
        raise UnsupportedModel(
            f"{path} asks for Python code that comes with the checkpoint, which could do whatever "
            f"you can: read it and, if you trust it, add --trust-remote-code; or, if transformers "
            f"can do without it, take {_AUTO_MAP} out of {path.name}"
        )
    for name in _classes(content[_AUTO_MAP]):
        module, _, found = name.rpartition(".")
        if "--" in name or not (module.isidentifier() and found.isidentifier()):
            raise UnsupportedModel(
                f"{path} takes its code from {shown_value(name)}, expected FILE.CLASS with a file "
                f"of the folder: copy the code into {shown(path.parent)} and name it so"
            )
        ordinary_file(path.parent, path.parent / f"{module}.py")


def configuration_hash(folder: Path, *, trusted: bool) -> str:
    """Return the SHA-256 of what the model computes: config.json, and the code if it may run."""
    found = sha256((folder / "config.json").read_bytes())
    for path in side_files(folder) if trusted else ():
        if path.match(PATTERN):
            found.update(f"\n{path.relative_to(folder)}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _classes(auto_map: Any) -> Iterator[str]:
    """Yield every class that is named; values that are no names are left to transformers."""
    pending = [auto_map]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, str):
            yield value
