"""The model card of an output: README.md with front matter, as the Hub reads it.

It holds nothing that differs between two runs which give the same weights.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.prune.scope import PruneScope
from lowmem_gblm.commands.report.facts import NO_TOKENS, facts
from lowmem_gblm.commands.report.outputs import evaluations_of
from lowmem_gblm.commands.request import DEFAULT_SHARD_BYTES, PruneRequest
from lowmem_gblm.methods import find_method
from lowmem_gblm.options import flag_of, options, parse_bytes
from lowmem_gblm.storage.atomic import publish_file
from lowmem_gblm.storage.checkpoint.file_access import BASE_CARD, CARD, RECORD
from lowmem_gblm.storage.hub import hub_id

_TEXT = """\
---
{front_matter}
---

# {base}, pruned by {method}

{zeros:.2%} of the weights of {tensors} matrices of {base} are zero.
lowmem-gblm {version} has pruned them by {method}: {title} ({paper}).
{kept}

The files are those of a dense model with zeros in it: they load as that does, and are as large.

{how}

## Results

{results}

## Make it again

```sh
{command}
```

`{record}` has every option, the zeros of every tensor and the versions of what computed them.
The card of {base}, if it has one, is `{base_card}`.
"""
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"
_UNMEASURED = "Nothing was measured."
# What is said of a run, and of its results, of all that a report says.
_HOW, _RESULTS = ("Method", "Pattern", "Calibration"), ("Perplexity", "Tasks")
_DATASETS = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext"}
_LICENCE = re.compile(r"^(license|license_name|license_link): (.{1,200})$", re.MULTILINE)
_LONGEST_FRONT_MATTER = 1 << 16
# What an option means that is not given.
_UNDERSTOOD = {"max_shard_size": DEFAULT_SHARD_BYTES}


def model_card(scope: PruneScope, record: dict[str, Any]) -> str:
    """Return the text of the card of a finished run."""
    method, base = scope.method, record["model"]
    return _TEXT.format(
        front_matter=_front_matter(scope, record),
        base=base,
        method=method.name,
        zeros=record["sparsity_measured"],
        tensors=len(record["tensors"]),
        version=record["versions"]["lowmem-gblm"],
        title=method.title,
        paper=method.paper,
        kept="Kept weights were updated."
        if method.updates_weights
        else "Kept weights are those of the base model, bit for bit.",
        how=_table(record, [], _HOW),
        results=f"{_BEGIN}\n{_UNMEASURED}\n{_END}",
        command=_command(record),
        record=RECORD,
        base_card=BASE_CARD,
    )


def show_results(folder: Path, record: dict[str, Any]) -> None:
    """Write what was measured of an output into its card, if that still has the place for it."""
    card = folder / CARD
    evaluations, _ = evaluations_of(folder, record)
    if not evaluations or not card.is_file():
        return
    before, begin, rest = card.read_text(encoding="utf-8", errors="replace").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if end:
        table = _table(record, evaluations, _RESULTS)
        text = f"{before}{begin}\n{table}\n{end}{after}"
        publish_file(card, [text.encode()], "the model card", replaces=True)


def _table(
    record: dict[str, Any], evaluations: Iterable[dict[str, Any]], headings: Iterable[str]
) -> str:
    """Return some rows of what a report says of an output."""
    output = {
        "run": record,
        "total": {"sparsity": record["sparsity_measured"]},
        "evaluations": list(evaluations),
        "notes": [],
    }
    cells = {heading: cell for heading, (cell,) in facts([output]) if heading in headings}
    rows = [f"| {heading} | {'<br>'.join(lines)} |" for heading, lines in cells.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _front_matter(scope: PruneScope, record: dict[str, Any]) -> str:
    """Return the metadata of the card as YAML."""
    from huggingface_hub import ModelCardData

    calibrated = record["fingerprints"]["calibration_tokens"] != NO_TOKENS
    text = _dataset(record["calibration"]) if calibrated else None
    pattern = record["pattern"]
    patterns = dict.fromkeys(pattern.values() if isinstance(pattern, dict) else [pattern])
    data = ModelCardData(
        # The name of a folder would be a link to another model, or to none.
        base_model=_valid(hub_id(scope.request.model)),
        library_name="transformers",
        tags=["pruned", "sparse", record["method"], *patterns, "lowmem-gblm"],
        datasets=None if text is None else [text],
        **licence_of(scope.model.folder),
    )
    yaml: str = data.to_yaml()
    return yaml


def _dataset(calibration: str) -> str | None:
    """Return the data set of the Hub that calibration samples are of; None if it is another text.

    A data set may be given as "owner/name:config:split".
    """
    name = calibration.partition(":")[0]
    return _DATASETS.get(calibration, _valid(name) if "/" in name else None)


def _valid(name: str | None) -> str | None:
    """Return a name if it may be one of the Hub, which refuses a card with others."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def licence_of(folder: Path) -> dict[str, str]:
    """Return what the card of a model says of its licence, or that a file has it."""
    found = _said_of_licence(folder / CARD)
    if "license" in found:
        return found
    files = [path.name for path in sorted(folder.glob("LICENSE*")) if path.is_file()]
    if not files:
        return {}
    return {
        "license": "other",
        "license_name": "license-of-the-base-model",
        "license_link": files[0],
    }


def _said_of_licence(card: Path) -> dict[str, str]:
    """Return the lines about the licence in the front matter of a card that comes with a model.

    Other YAML is not read: a small text can cost hours, or become a large value.
    """
    from yaml import BaseLoader, YAMLError, load

    if not card.is_file():
        return {}
    with card.open(encoding="utf-8-sig", errors="replace") as file:
        before, begin, rest = file.read(_LONGEST_FRONT_MATTER).partition("---\n")
    found = {}
    if begin and not before.strip():
        for name, text in _LICENCE.findall(rest.partition("\n---")[0]):
            with suppress(YAMLError):
                found[name] = load(text, Loader=BaseLoader)
    return {name: value for name, value in found.items() if isinstance(value, str) and value}


def _command(record: dict[str, Any]) -> str:
    """Return what to type for the same weights, as the recipe of a record says."""
    words = ["lowmem-gblm", "prune", record["model"], "OUTPUT"]
    recipe = record["recipe"]
    if isinstance(record["pattern"], dict):
        return shlex.join([*words, "--recipe", RECORD])
    kinds: list[type[Any]] = [PruneRequest, find_method(recipe["method"]).options]
    declared = {one.name: one for kind in kinds for one in options(kind)}
    defaults = {name: one.default for name, one in declared.items()} | _UNDERSTOOD
    for name, value in recipe.items():
        if value != defaults[name] or name == "method":
            words += _typed(name, value, declared[name].metadata["parse"])
    return shlex.join(words)


def _typed(name: str, value: Any, parse: Any) -> Iterator[str]:
    """Yield what is typed for the value of an option."""
    if parse is bool:
        yield flag_of(name)
        return
    for one in value if isinstance(value, list) else (value,):
        yield flag_of(name)
        yield f"{one}B" if parse is parse_bytes else str(one)
