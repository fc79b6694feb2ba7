"""Text into token windows: the calibration draws of the authors' code, and evaluation windows.

The draws are those of the published code of SparseGPT, Wanda and GBLM-Pruner, so that results can
be compared number by number.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowmem_gblm.commands.held_out import check_enough, held_out_starts
from lowmem_gblm.errors import RequestError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_gblm.model.tokenizer import Tokenize

Split = Literal["calibration", "evaluation"]
# Texts that are known by name; any other name is that of a file.
NAMED = ("c4", "wikitext2", "demo")

_A_FILE = "a .txt, .jsonl, .json.gz or .parquet file"
_DOCUMENT_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_C4_EVALUATION_DOCUMENTS = 1100
_WIKITEXT2_CALIBRATION_BYTES = 10_900_000


@dataclass(frozen=True)
class Text:
    """A running text, tokenized in one piece."""

    text: str
    origin: str


@dataclass(frozen=True)
class Documents:
    """Separate documents: every sample is taken from one of them."""

    rows: Sequence[str]
    origin: str


def resolve_bos(asked: str, model_type: str) -> str:
    """Return whether every window begins with `<bos>`, "always" or "never", as asked.

    `auto` means the Gemma family, which reads nothing sensible without it; lm-evaluation-harness
    tells that family likewise. The papers' protocol, for LLaMA, has it before a text only.
    """
    if asked == "auto":
        return "always" if "gemma" in model_type else "never"
    return asked


def bos_of_windows(asked: str, model_type: str, bos: int | None) -> int | None:
    """Return the token that every window begins with, if any; `bos` is that of the tokenizer."""
    if resolve_bos(asked, model_type) == "never":
        return None
    if bos is None:
        raise RequestError("the tokenizer has no <bos> token: give --bos never")
    return bos


def calibration_samples(
    source: Text | Documents,
    tokenize: Tokenize,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
    held_out: int = 0,
) -> Tensor:
    """Draw calibration samples, int64 [N, T]; a sample of `Documents` lies within one of them.

    Every start is `randint(0, len(tokens) - seqlen - 1)` of a `random.Random(seed)`, in the order
    of the samples; documents are drawn until one is longer than `seqlen` tokens. With a `bos`,
    every sample is that token and `seqlen - 1` tokens of the text. So many `held_out` windows
    follow, of documents or places that no sample is of; they change no sample.
    """
    import torch

    def tokens_of(text: str) -> Sequence[int]:
        return _without(bos, tokenize(text))

    draw = random.Random(seed)
    length = seqlen if bos is None else seqlen - 1
    if isinstance(source, Text):
        complete = tokens_of(source.text)
        if len(complete) <= length:
            raise RequestError(
                f"{source.origin} has {len(complete)} tokens; samples of {length} tokens need at "
                f"least {length + 1}. Give a longer text, or a smaller --seqlen"
            )
        starts = [draw.randint(0, len(complete) - length - 1) for _ in range(nsamples)]
        starts += held_out_starts(starts, len(complete), length, held_out, draw)
        samples = [list(complete[start : start + length]) for start in starts]
    else:
        samples, used = [], set[int]()
        while len(samples) < nsamples + held_out:
            # Drawn one by one: each before the start of its sample.
            is_sample = len(samples) < nsamples
            drawn = _draw_document(source, tokens_of, length, draw, () if is_sample else used)
            if drawn is None:
                break
            index, tokens = drawn
            used.add(index)
            start = draw.randint(0, len(tokens) - length - 1)
            samples.append(list(tokens[start : start + length]))
    check_enough(len(samples) - nsamples, held_out, length, source.origin)
    return _beginning_with(bos, torch.tensor(samples))


def _without(bos: int | None, tokens: Sequence[int]) -> Sequence[int]:
    """Return the tokens of a text without the `bos` that the tokenizer has put before them."""
    return tokens[1:] if bos is not None and list(tokens[:1]) == [bos] else tokens


def _beginning_with(bos: int | None, windows_NT: Tensor) -> Tensor:
    """Return the windows with a token before each; as they are without one."""
    if bos is None:
        return windows_NT
    import torch

    return torch.cat([torch.full_like(windows_NT[:, :1], bos), windows_NT], dim=1)


def _draw_document(
    source: Documents,
    tokenize: Tokenize,
    seqlen: int,
    draw: random.Random,
    avoided: Collection[int],
) -> tuple[int, Sequence[int]] | None:
    """Draw a document longer than `seqlen` tokens; return its number and its tokens.

    Returns None if there is none but those to be `avoided`.
    """
    lengths: dict[int, int] = dict.fromkeys(avoided, 0)
    while len(lengths) < len(source.rows):
        index = draw.randint(0, len(source.rows) - 1)
        if index in lengths:
            continue
        tokens = tokenize(source.rows[index])
        if len(tokens) > seqlen:
            return index, tokens
        lengths[index] = len(tokens)
    if avoided:
        return None
    raise RequestError(
        f"none of the {len(source.rows)} documents of {source.origin} is longer than {seqlen} "
        f"tokens; the longest has {max(lengths.values(), default=0)}. Give longer ones, or a "
        f"smaller --seqlen"
    )


def evaluation_windows(
    source: Text | Documents,
    tokenize: Tokenize,
    *,
    seqlen: int,
    windows: int | None,
    bos: int | None = None,
) -> Tensor:
    """Cut a text into windows that do not overlap, int64 [windows, T]; the tail is dropped.

    With a `bos`, every window is that token and `seqlen - 1` tokens of the text.
    """
    import torch

    text = source.text if isinstance(source, Text) else "\n\n".join(source.rows)
    tokens = _without(bos, tokenize(text))
    length = seqlen if bos is None else seqlen - 1
    count = len(tokens) // length
    if count == 0:
        raise RequestError(
            f"{source.origin} has {len(tokens)} tokens, fewer than one window of {length}. Give a "
            f"longer text, or a smaller --seqlen"
        )
    count = min(count, windows or count)
    cut = torch.tensor(list(tokens[: count * length])).view(count, length)
    return _beginning_with(bos, cut)


def open_source(name: str, split: Split, column: str = "text") -> Text | Documents:
    """Open one of the texts `NAMED`, or a .txt, .jsonl, .json.gz or .parquet file.

    Calibration and evaluation read different parts of the named data sets.
    """
    if name == "demo":
        text = _embedded(split).read_text(encoding="utf-8")
        return Text(text, f"the embedded {split} text")
    if name == "c4":
        return _c4(split)
    if name == "wikitext2":
        return _wikitext2(split)
    path = Path(name)
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give {_A_FILE}")
    if not path.is_file():
        named = ", ".join(NAMED)
        raise RequestError(f"there is no text {name!r}: give {named}, or the path of {_A_FILE}")
    if path.stat().st_size == 0:
        raise RequestError(f"{path} is empty")
    return _open_file(path, column)


def _embedded(split: Split) -> Path:
    return Path(str(resources.files("lowmem_gblm") / "demo" / f"{split}.txt"))


def calibration_text_bytes(name: str) -> int:
    """Return how many bytes of calibration text are tokenized in one piece; 0 for documents."""
    if name == "wikitext2":
        return _WIKITEXT2_CALIBRATION_BYTES
    path = _embedded("calibration") if name == "demo" else Path(name)
    return path.stat().st_size if path.suffix == ".txt" and path.is_file() else 0


def _open_file(path: Path, column: str) -> Text | Documents:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    loader = _DOCUMENT_LOADERS.get(suffixes[-1] if suffixes else "")
    if loader is not None:
        return _documents(_load(loader, data_files=str(path)), column, str(path))
    if path.suffix != ".txt":
        raise RequestError(
            f"{path} is of no known kind: .txt for a text; .jsonl, .json.gz or .parquet for "
            f"documents"
        )
    try:
        return Text(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: {error}") from None


def _documents(dataset: Any, column: str, origin: str) -> Documents:
    if column not in dataset.column_names:
        raise RequestError(
            f"{origin} has no column {column!r}, but {', '.join(dataset.column_names)}: name it "
            f"with --text-column"
        )
    if len(dataset) == 0:
        raise RequestError(f"{origin} has no documents")
    if not isinstance(dataset[0][column], str):
        raise RequestError(f"column {column!r} of {origin} holds no text")
    return Documents(_Column(dataset, column, origin), origin)


@dataclass(frozen=True)
class _Column(Sequence[str]):
    """A column of a data set, read row by row from its memory-mapped table."""

    dataset: Any
    name: str
    origin: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        text = self.dataset[index][self.name]
        if not isinstance(text, str):
            raise RequestError(
                f"row {index} of {self.origin} holds no text in column {self.name!r}"
            )
        return text


def _c4(split: Split) -> Documents | Text:
    part = "train.00000-of-01024" if split == "calibration" else "validation.00000-of-00008"
    dataset = _load("allenai/c4", data_files={"train": f"en/c4-{part}.json.gz"})
    if split == "calibration":
        return _documents(dataset, "text", "C4")
    return Text(" ".join(dataset[:_C4_EVALUATION_DOCUMENTS]["text"]), "C4")


def _wikitext2(split: Split) -> Text:
    """Return WikiText-2; calibration joins the rows of `train` by a space, as the authors do."""
    part, joint = ("train", " ") if split == "calibration" else ("test", "\n\n")
    dataset = _load("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    return Text(joint.join(dataset["text"]), "WikiText-2")


def _load(*args: Any, split: str = "train", **kwargs: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(*args, split=split, **kwargs)
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error.__cause__ or error)
        if args[0] in _DOCUMENT_LOADERS.values():
            raise RequestError(f"{kwargs['data_files']} cannot be read: {reason}") from None
        raise RequestError(
            f"{args[0]} cannot be loaded from the Hub: {reason}. Without a network give a local "
            f"text file instead of its name"
        ) from None
