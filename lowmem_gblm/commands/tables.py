"""Tables of documents, which the library `datasets` reads: files, and data sets of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lowmem_gblm.errors import RequestError, first_line

Row = Mapping[str, Any]

# A data set of the Hub may have terabytes: its first documents after a shuffle are taken.
_TAKEN_CHARACTERS = 64 << 20
_SHUFFLED_ROWS = 10_000


class Table(Protocol):
    """A table with named columns, as a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]:
        """Return the names of the columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


class _Rows:
    """Rows in memory, as a `Table`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.column_names = list(rows[0]) if rows else ["text"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int, /) -> Row:
        return self._rows[row]


def table_of_file(loader: str, path: Path) -> Any:
    """Return the rows of a file, memory-mapped; `loader` is "json" or "parquet"."""
    try:
        return _load(loader, data_files=str(path), split="train")
    except _load_errors() as error:
        raise RequestError(f"{path} cannot be read: {_reason(error)}") from None


def table_from_hub(path: str, option: str, **asked: Any) -> Any:
    """Return a part of a data set of the Hub that an `option` asks for.

    `asked` are arguments of `datasets.load_dataset`. With `streaming`, not all is downloaded: the
    part is shuffled, and its first rows are taken.
    """
    from lowmem_gblm.storage.hub import NO_ANSWER, offline_if_unreachable

    with offline_if_unreachable() as answers:
        try:
            return _load(path, **asked)
        except _load_errors() as error:
            reason = _reason(error) if answers else NO_ANSWER
            raise RequestError(
                f"{path} cannot be loaded from the Hub: {reason}. Without a network give a local "
                f"text: {option} FILE"
            ) from None


def _first(dataset: Any) -> Iterator[Row]:
    """Yield rows of a streamed data set, shuffled as a seed says, up to a number of characters."""
    characters = 0
    for row in dataset.shuffle(seed=0, buffer_size=_SHUFFLED_ROWS):
        yield row
        characters += len(str(row))
        if characters > _TAKEN_CHARACTERS:
            return


def _load(path: str, **asked: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    dataset = datasets.load_dataset(path, **asked)
    return _Rows(list(_first(dataset))) if asked.get("streaming") else dataset


def _load_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return OSError, ValueError, StopIteration, DatasetsError


def _reason(error: Exception) -> str:
    return first_line(error.__cause__ or error)
