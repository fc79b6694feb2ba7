"""The tokenizer of a model folder."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_gblm.errors import CheckpointError, RequestError, first_line, shown
from lowmem_gblm.storage.checkpoint.remote_code import check_remote_code
from lowmem_gblm.storage.checkpoint.strict_json import read_json

# A text, or a conversation as a list of messages, to token ids.
Tokenize = Callable[[Any], Sequence[int]]

_TOKENIZER_FILE = re.compile(r"token|vocab|merges|spiece|\.(model|tiktoken|jinja)$")
_MAX_TOKENIZER_BYTES = 1 << 28
# Before a chat template: what it takes for today, so that samples do not depend on it.
_TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model: a function to token ids, and the ids of `<bos>` and `<eos>`."""

    _tokenize: Tokenize
    bos: int | None
    eos: int | None

    def __call__(self, document: str | Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """Return token ids, with the special tokens that the tokenizer adds by itself.

        A conversation goes through the chat template.
        """
        return self._tokenize(document)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer of a model folder.

    This and its calls raise a `CheckpointError` if the tokenizer does not work.
    """
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)

    def tokenize(document: str | Sequence[Mapping[str, Any]]) -> Sequence[int]:
        if not isinstance(document, str):
            return _conversation(tokenizer, folder, document)
        with _tokenizer_errors(folder):
            ids: Sequence[int] = tokenizer(document, verbose=False)["input_ids"]
            return ids

    return Tokenizer(tokenize, tokenizer.bos_token_id, tokenizer.eos_token_id)


def _conversation(
    tokenizer: Any, folder: Path, messages: Sequence[Mapping[str, Any]]
) -> Sequence[int]:
    """Return the token ids of a conversation in the chat template, on any day the same."""
    if tokenizer.chat_template is None:
        raise RequestError(
            f"the tokenizer of {folder} has no chat template, which conversations need: give a text"
        )
    try:
        template = _TODAY + tokenizer.get_chat_template()
        ids: Sequence[int] = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=False
        )
    # The code of a template may raise anything.
    except Exception as error:
        raise RequestError(
            f"the chat template of {folder} does not take a conversation: {first_line(error)}"
        ) from None
    return ids


def open_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder as transformers has it, after a try."""
    from transformers import AutoTokenizer

    for path in sorted(folder.iterdir()):
        if _TOKENIZER_FILE.search(path.name) and path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{folder} has no usable tokenizer: {shown(path.name)} has {path.stat().st_size} "
                f"bytes, expected at most {_MAX_TOKENIZER_BYTES}"
            )
    with _tokenizer_errors(folder), _mute():
        if trust_remote_code:
            _check_code(folder, trusted=True)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception:
            _check_code(folder, trusted=trust_remote_code)
            raise
        tokenizer("a", verbose=False)
    return tokenizer


def _check_code(folder: Path, *, trusted: bool) -> None:
    """Raise if the tokenizer asks for code that may not run."""
    path = folder / "tokenizer_config.json"
    content: dict[str, Any] = {}
    # A file that cannot be read is for transformers to refuse.
    with suppress(CheckpointError):
        content = read_json(path)
    check_remote_code(path, content, trusted=trusted)


@contextmanager
def _tokenizer_errors(folder: Path) -> Iterator[None]:
    """Run the body; whatever a broken tokenizer raises becomes a `CheckpointError`."""
    try:
        yield
    # GeneratorExit comes if an interruption has kept the body from being entered.
    except (KeyboardInterrupt, GeneratorExit, MemoryError, CheckpointError):
        raise
    # The library raises bare Exceptions, and its panics are not even Exceptions.
    except BaseException as error:
        if not any(_TOKENIZER_FILE.search(path.name) for path in folder.iterdir()):
            raise CheckpointError(
                f"{folder} has no tokenizer: there is no tokenizer.json, tokenizer.model or vocab "
                f"file in it. Copy the tokenizer's files from where the model came from"
            ) from None
        raise CheckpointError(f"{folder} has no usable tokenizer: {first_line(error)}") from None


@contextmanager
def _mute() -> Iterator[None]:
    """Run the body without stderr, even of other languages: a panic reports itself there."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
