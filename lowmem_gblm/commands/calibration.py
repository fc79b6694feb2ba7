"""Text into token windows: the calibration draws of the authors' code, and evaluation windows.

The draws are those of the published code of SparseGPT, Wanda and GBLM-Pruner, so that results can
be compared number by number.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lowmem_gblm.commands.held_out import check_enough, held_out_starts
from lowmem_gblm.commands.texts import Document, Documents, Text
from lowmem_gblm.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_gblm.model.tokenizer import Tokenize


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


class Samples(NamedTuple):
    """Calibration samples, then held-out windows, int64 [N, T]; notes for the record."""

    tokens_NT: Tensor
    notes: Sequence[str] = ()


def calibration_samples(
    source: Text | Documents,
    tokenize: Tokenize,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
    packing: bool = False,
    eos: int | None = None,
    held_out: int = 0,
) -> Samples:
    """Draw calibration samples; a sample of `Documents` lies within one of them, unless packed.

    Every start is `randint(0, len(tokens) - seqlen - 1)` of a `random.Random(seed)`, in the order
    of the samples; documents are drawn until one is longer than `seqlen` tokens. With a `bos`,
    every sample is that token and `seqlen - 1` tokens of the text. For `packing` see `_packed`. So
    many `held_out` windows follow, of documents or places that no sample is of; they change no
    sample.
    """
    import torch

    def tokens_of(document: Document) -> Sequence[int]:
        return _without(bos, tokenize(document))

    draw = random.Random(seed)
    length = seqlen if bos is None else seqlen - 1
    if packing:
        drawn = _packed(source, tokens_of, eos, (nsamples, held_out), length, draw)
    elif isinstance(source, Text):
        drawn = _of_text(source, tokens_of, (nsamples, held_out), length, draw)
    else:
        drawn = _of_documents(source, tokens_of, (nsamples, held_out), length, draw)
    check_enough(len(drawn.samples) - nsamples, held_out, length, source.origin)
    tokens_NT = _beginning_with(bos, torch.tensor(drawn.samples))
    return Samples(tokens_NT, _scarce(source, drawn, nsamples))


class _Drawn(NamedTuple):
    """Samples and held-out windows; documents of samples, and how many samples fit in these."""

    samples: list[list[int]]
    documents: int
    room: int


def _scarce(source: Text | Documents, drawn: _Drawn, count: int) -> list[str]:
    """Say that there is less text than so many samples have."""
    if drawn.room >= count:
        return []
    found = "" if isinstance(source, Text) else f" in {drawn.documents} documents"
    # The note is in pruning.json, which has no path of this machine.
    path = Path(source.origin)
    name = path.name if path.is_file() else source.origin
    return [
        f"{name} has room for {drawn.room} distinct windows{found}: the {count} calibration "
        f"samples repeat some of its text"
    ]


def _of_text(
    source: Text, tokens_of: Tokenize, counts: tuple[int, int], length: int, draw: random.Random
) -> _Drawn:
    nsamples, held_out = counts
    tokens = tokens_of(source.text)
    if len(tokens) <= length:
        raise RequestError(
            f"{source.origin} has {len(tokens)} tokens; samples of {length} tokens need at "
            f"least {length + 1}. Give a longer text, or a smaller --seqlen"
        )
    starts = [draw.randint(0, len(tokens) - length - 1) for _ in range(nsamples)]
    starts += held_out_starts(starts, len(tokens), length, held_out, draw)
    samples = [list(tokens[start : start + length]) for start in starts]
    return _Drawn(samples, 1, len(tokens) // length)


def _of_documents(
    source: Documents,
    tokens_of: Tokenize,
    counts: tuple[int, int],
    length: int,
    draw: random.Random,
) -> _Drawn:
    nsamples, held_out = counts
    samples: list[list[int]] = []
    room: dict[int, int] = {}
    used: set[int] = set()
    while len(samples) < nsamples + held_out:
        # Drawn one by one: each before the start of its sample.
        is_sample = len(samples) < nsamples
        drawn = _draw_document(source, tokens_of, length, draw, () if is_sample else used)
        if drawn is None:
            break
        index, tokens = drawn
        start = draw.randint(0, len(tokens) - length - 1)
        samples.append(list(tokens[start : start + length]))
        used.add(index)
        if is_sample:
            room[index] = len(tokens) // length
    return _Drawn(samples, len(room), sum(room.values()))


def _packed(
    source: Text | Documents,
    tokens_of: Tokenize,
    eos: int | None,
    counts: tuple[int, int],
    length: int,
    draw: random.Random,
) -> _Drawn:
    """Cut samples from documents that are joined in random order, an `eos` after every text.

    When all documents are used, they are joined once more in another order, though not for windows
    that are held out.
    """
    if isinstance(source, Text):
        raise RequestError(f"{source.origin} is one running text: leave out --packing")
    end = [] if eos is None else [eos]
    count, nsamples, needed = len(source.rows), counts[0], sum(counts) * length
    joined: list[int] = []
    used = room = 0
    while len(joined) < needed:
        for index in draw.sample(range(count), count):
            document = source.rows[index]
            joined += [*tokens_of(document), *(end if isinstance(document, str) else [])]
            used += 1
            if len(joined) >= needed:
                break
        # As many as after the first time: text that is joined once more is not new.
        room = room or len(joined) // length
        if not room:
            raise RequestError(
                f"the {count} documents of {source.origin} have {len(joined)} tokens together, "
                f"fewer than one sample of {length}. Give more, or a smaller --seqlen"
            )
    samples = [joined[start : start + length] for start in range(0, needed, length)]
    return _Drawn(samples[: max(nsamples, room)], min(used, count), room)


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
        f"tokens; the longest has {max(lengths.values(), default=0)}. Give longer ones, a smaller "
        f"--seqlen, or --packing to join them"
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

    text = source.text if isinstance(source, Text) else "\n\n".join(_texts(source))
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


def _texts(source: Documents) -> Iterator[str]:
    for row in source.rows:
        if not isinstance(row, str):
            raise RequestError(
                f"{source.origin} holds conversations, and perplexity is that of a text: name "
                f"another column with --text-column"
            )
        yield row
