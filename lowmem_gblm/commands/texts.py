"""Where texts come from: names, files, data sets of the Hub, and what Python code gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lowmem_gblm.commands.tables import Table, table_from_hub, table_of_file
from lowmem_gblm.embedded import EMBEDDED, embedded_file
from lowmem_gblm.errors import RequestError, shown_value
from lowmem_gblm.options import as_path

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["calibration", "evaluation"]
# A document: a text, or a conversation as a list of messages with "role" and "content".
Document: TypeAlias = str | Sequence[Mapping[str, Any]]
# Texts that are known by name; any other name is that of a file, or of a data set of the Hub.
NAMED = ("c4", "wikitext2", EMBEDDED)
# The name of texts and samples that Python code has given.
IN_MEMORY = "in memory"

_OPTIONS = {"calibration": "--calibration", "evaluation": "--text"}
_A_DATASET = "a data set of the Hub as owner/name:config:split"
_A_FILE = "a .txt, .jsonl, .json.gz or .parquet file"
_DOCUMENT_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_FILES = (*_DOCUMENT_LOADERS, ".txt", ".gz")
_DATASET = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([^:]*))?(?::([^:]+))?")
_C4_EVALUATION_DOCUMENTS = 1100
_WIKITEXT2_CALIBRATION_BYTES = 10_900_000
_TEXT, _MESSAGES = "text", "messages"

# What `calibration` may be in Python: a name, documents, a table of them, or samples of token ids.
Calibration: TypeAlias = (
    "str | PathLike[str] | Sequence[Document] | Table | Tensor | Sequence[Tensor]"
)


@dataclass(frozen=True)
class Text:
    """A running text, tokenized in one piece."""

    text: str
    origin: str


@dataclass(frozen=True)
class Documents:
    """Separate documents: every sample is taken from one of them, unless they are packed."""

    rows: Sequence[Document]
    origin: str


@dataclass(frozen=True, eq=False)
class InMemory:
    """Calibration that Python code has given.

    Attributes:
        content: Documents, or a table of them; unused where there are tokens.
        tokens_NT: The samples themselves, int64 [N, T], or None.
    """

    content: Any = None
    tokens_NT: Tensor | None = None


def as_calibration(value: Any) -> str | InMemory:
    """Return where samples come from: a name, or what Python code has given as `Calibration`."""
    if isinstance(value, InMemory):
        return value
    if isinstance(value, (str, PathLike)):
        return _named("--calibration", value)
    if isinstance(getattr(value, "column_names", None), list) and hasattr(value, "__len__"):
        return InMemory(content=value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_document, value)):
        return InMemory(content=value)
    return InMemory(tokens_NT=_given_tokens(value))


def as_text(value: Any) -> str:
    """Return the name of a text that is to be measured on."""
    return _named("--text", value)


def _named(option: str, value: Any) -> str:
    if value == "":
        raise RequestError(f"{option} is an empty name: leave it out for the default")
    return as_path(option, value)


def _given_tokens(rows: Any) -> Tensor:
    """Return samples, int64 [N, T], from rows of token ids, each [T] or [1, T]."""
    import torch

    try:
        tokens_NT = torch.cat([torch.atleast_2d(torch.as_tensor(row)).cpu() for row in rows])
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise RequestError(
            f"the calibration must be a file, a name, a list of texts or of token ids of one "
            f"length, or a datasets.Dataset; got {shown_value(type(rows).__name__)}"
        ) from None
    kind = tokens_NT.dtype
    integers = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    if not integers or tokens_NT.dim() != 2 or tokens_NT.shape[1] < 2 or int(tokens_NT.min()) < 0:
        raise RequestError(
            f"calibration samples must be integers from 0 on, at least 2 a sample; got "
            f"{tokens_NT.dtype} {list(tokens_NT.shape)}"
        )
    return tokens_NT.long()


def open_source(source: str | InMemory, split: Split, column: str = _TEXT) -> Text | Documents:
    """Open one of the texts `NAMED`, a .txt, .jsonl, .json.gz or .parquet file, or another source.

    Calibration and evaluation read different parts of the named data sets. Other data sets of the
    Hub, as "owner/name:config:split", and conversations are for calibration alone.
    """
    if isinstance(source, InMemory):
        return _given_documents(source.content, column)
    if source == EMBEDDED:
        text = embedded_file(f"{split}.txt").read_text(encoding="utf-8")
        return Text(text, f"the embedded {split} text")
    if source == "c4":
        return _c4(split)
    if source == "wikitext2":
        return _wikitext2(split)
    if source == IN_MEMORY:
        raise RequestError("the calibration was given in memory: call prune with it once more")
    path = Path(source)
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give {_A_FILE}")
    if path.is_file():
        if path.stat().st_size == 0:
            raise RequestError(f"{path} is empty")
        return _open_file(path, column)
    dataset = _DATASET.fullmatch(source)
    if dataset is not None and split == "calibration" and path.suffix not in _FILES:
        repository, name, part = dataset.groups()
        asked = {"name": name or None, "split": part or "train", "streaming": True}
        return _documents(table_from_hub(repository, _OPTIONS[split], **asked), column, source)
    named = ", ".join(NAMED)
    also = f", {_A_DATASET}" if split == "calibration" else ""
    raise RequestError(f"there is no text {source!r}: give {named}{also}, or the path of {_A_FILE}")


def calibration_text_bytes(name: str) -> int:
    """Return how many bytes of calibration text are tokenized in one piece; 0 for documents."""
    if name == "wikitext2":
        return _WIKITEXT2_CALIBRATION_BYTES
    path = embedded_file("calibration.txt") if name == EMBEDDED else Path(name)
    return path.stat().st_size if path.suffix == ".txt" and path.is_file() else 0


def _open_file(path: Path, column: str) -> Text | Documents:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    loader = _DOCUMENT_LOADERS.get(suffixes[-1] if suffixes else "")
    if loader is not None:
        return _documents(table_of_file(loader, path), column, str(path))
    if path.suffix != ".txt":
        raise RequestError(
            f"{path} is of no known kind: .txt for a text; .jsonl, .json.gz or .parquet for "
            f"documents"
        )
    try:
        return Text(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: {error}") from None


def _given_documents(content: Any, column: str) -> Documents:
    if isinstance(content, (list, tuple)):
        return Documents([_plain(row) for row in content], "the given list")
    return _documents(content, column, "the given data set")


def _documents(dataset: Any, column: str, origin: str) -> Documents:
    """Return a column as documents: the one asked for, or "messages" where "text" is none."""
    names = dataset.column_names
    if column == _TEXT and _TEXT not in names and _MESSAGES in names:
        column = _MESSAGES
    if column not in names:
        raise RequestError(
            f"{origin} has no column {column!r}, but {', '.join(names)}: name it with --text-column"
        )
    if len(dataset) == 0:
        raise RequestError(f"{origin} has no documents")
    if not _is_document(dataset[0][column]):
        raise RequestError(f"column {column!r} of {origin} holds no text")
    return Documents(_Column(dataset, column, origin), origin)


def _is_document(value: Any) -> bool:
    """Return whether a value is a text, or a conversation."""
    if not isinstance(value, (list, tuple)):
        return isinstance(value, str)
    turns = [isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value]
    return bool(turns) and all(turns)


def _plain(row: Document) -> Document:
    """Return a document; a conversation without what other rows of its table have in messages."""
    if isinstance(row, str):
        return row
    return [{name: part for name, part in turn.items() if part is not None} for turn in row]


@dataclass(frozen=True)
class _Column(Sequence[Document]):
    """A column of a data set, read row by row from its memory-mapped table."""

    dataset: Any
    name: str
    origin: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = self.dataset[index][self.name]
        if not _is_document(row):
            raise RequestError(
                f"row {index} of {self.origin} holds no text in column {self.name!r}"
            )
        return _plain(row)


def _c4(split: Split) -> Documents | Text:
    part = "train.00000-of-01024" if split == "calibration" else "validation.00000-of-00008"
    files = {"train": f"en/c4-{part}.json.gz"}
    dataset = table_from_hub("allenai/c4", _OPTIONS[split], data_files=files, split="train")
    if split == "calibration":
        return _documents(dataset, "text", "C4")
    return Text(" ".join(dataset[:_C4_EVALUATION_DOCUMENTS]["text"]), "C4")


def _wikitext2(split: Split) -> Text:
    """Return WikiText-2; calibration joins the rows of `train` by a space, as the authors do."""
    part, joint = ("train", " ") if split == "calibration" else ("test", "\n\n")
    names = {"name": "wikitext-2-raw-v1", "split": part}
    dataset = table_from_hub("Salesforce/wikitext", _OPTIONS[split], **names)
    return Text(joint.join(dataset["text"]), "WikiText-2")
