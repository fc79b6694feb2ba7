"""What a comparison has finished, in `comparison.json` of its folder: what a resumed one skips.

format   of this file
dense    what was measured of the dense model
runs     by the name of the output: what prune has recorded, what was measured, what was kept
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import JobError
from lowmem_gblm.storage.atomic import publish_json
from lowmem_gblm.storage.checkpoint.strict_json import read_json
from lowmem_gblm.storage.locking import model_lock

FILE = "comparison.json"
FORMAT = 1
# Of pruning.json, what a row does not need and what is long.
_LONG = ("tensors", "shards")


class Ledger:
    """The content of the file; every change is durable when its method returns."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._content: dict[str, Any] = {"format": FORMAT, "dense": {}, "runs": {}}
        if self._path.exists():
            self._content = read_json(self._path)
            if self._content.get("format") != FORMAT:
                raise JobError(
                    f"{self._path} is not that of a comparison of this version: move it away, or "
                    f"choose another --output"
                )

    @property
    def dense(self) -> dict[str, Any]:
        """Return what is noted of the dense model: its `model` and `evaluation`; may be empty."""
        found: dict[str, Any] = self._content["dense"]
        return found

    def run(self, name: str) -> dict[str, Any]:
        """Return what is noted of a run; empty if nothing is.

        `own`: the comparison has made this output, or had begun to; `dropped`: it has removed it
        again; `record`: of pruning.json; `evaluation`: what was measured.
        """
        found: dict[str, Any] = self._content["runs"].get(name, {})
        return found

    def note_dense(self, **values: Any) -> None:
        """Note what was measured of the dense model."""
        self._content["dense"] = values
        self._publish()

    def note(self, name: str, **values: Any) -> None:
        """Note values of a run, beside those that are noted already."""
        if "record" in values:
            record = values["record"].items()
            values["record"] = {key: value for key, value in record if key not in _LONG}
        self._content["runs"][name] = self.run(name) | values
        self._publish()

    def _publish(self) -> None:
        publish_json(self._path, self._content, "the rows of the comparison", replaces=True)


def is_unfinished(folder: Path, names: Iterable[str]) -> bool:
    """Return whether a folder has a comparison in which a run of these names is not measured."""
    ledger = Ledger(folder)
    measured = (ledger.run(name).get("evaluation") for name in names)
    return (folder / FILE).exists() and not all(measured)


@contextmanager
def comparison_folder(folder: Path) -> Iterator[Path]:
    """Run the body with a folder that no other process uses; an empty one is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with model_lock(folder, alone=True):
            yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()
