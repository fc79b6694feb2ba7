"""A corpus of checkpoints as a stranger might send them: broken or hostile, and some only odd.

Every one is a copy of a tiny good checkpoint and what was done to it. In sentences, MODEL stands
for the folder; they are regular expressions for all that is printed.
"""

from __future__ import annotations

import json
from pathlib import Path

from support.damage import (
    SINGLE,
    Damage,
    both,
    config,
    header,
    link,
    moved,
    parts,
    tensor,
)  # fmt: skip
from support.malformed.files import ENTRIES, HEADERS, TENSORS
from support.malformed.folders import CONFIGS, FILES, INDEXES, TOKENIZERS

CORPUS = [*HEADERS, *ENTRIES, *TENSORS, *INDEXES, *FILES, *CONFIGS, *TOKENIZERS]


def hub_cache(folder: Path) -> None:
    """The folder becomes a link to a snapshot of a Hub cache, whose files are links to blobs."""
    cache = folder.parent / "models--some--one"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for number_, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / "blobs" / f"{number_:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number_:040x}")
    folder.rmdir()
    folder.symlink_to(snapshot)


# Odd, and fine.
UNUSUAL: dict[str, Damage] = {
    "a Hub cache": hub_cache,
    "a link within the folder": both(
        lambda folder: (folder / SINGLE).rename(folder / "other.safetensors"),
        link(SINGLE, "other.safetensors"),
    ),
    "a header padded with blanks": lambda folder: header(
        json.dumps(parts(folder)[0]).encode() + b" " * 99
    )(folder),
    "no metadata": moved(lambda described, pieces: None),
    "a tensor of no axes beside": tensor("scale", "F64", [], bytes(8)),
    "a tensor of nothing beside": tensor("empty", "BOOL", [2, 0, 3], b""),
    "a name with a line break": tensor("x\n\x00", "U8", [1], b"x"),
    "a name of a megabyte beside": tensor("x" * 10**6, "U8", [1], b"x"),
    "an infinity in the configuration": config(time_step_limit=[0.0, float("inf")]),
    "attention from the Hub": config(attn_implementation="kernels-community/flash-attn"),
    "experts from the Hub": config(experts_implementation="kernels-community/experts"),
    "the name of a method in the configuration": config(push_to_hub=False),
    "pickles that were deleted from a cache": link("pytorch_model.bin", "../../blobs/gone"),
}
