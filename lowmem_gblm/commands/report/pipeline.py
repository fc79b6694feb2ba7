"""A report: open the outputs, measure their masks, say what the numbers say, write the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.report.measure import measure
from lowmem_gblm.commands.report.numbers import numbers
from lowmem_gblm.commands.report.outputs import open_outputs
from lowmem_gblm.commands.report.page import GENERATOR, page
from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.runtime.activity import activity
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.atomic import publish_file

_BEGINNING_BYTES = 1000


def report(
    output: str,
    against: Sequence[str] = (),
    html: Path | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Measure the masks of outputs of one model; return the numbers, and write them as a page.

    Args:
        output: Folder made by `prune`.
        against: Other outputs to compare it with.
        html: File for the page; None for no page. An earlier report there is replaced.

    Raises:
        LowmemGblmError: A folder is no output, or is that of another model; or the page may not be
            written there.
    """
    if html is not None:
        _check_free(html)
    outputs = open_outputs([output, *against])
    measured = measure(outputs, listener)
    found = numbers(measured)
    if html is not None:
        with activity("drawing the page"):
            content = page(found, measured).encode()
        publish_file(html, [content], "the report", replaces=True)
    return {**found, "html": None if html is None else str(html)}


def _check_free(html: Path) -> None:
    """Raise unless a page may be written there: a new file, or an earlier report."""
    if not html.parent.is_dir():
        raise RequestError(f"there is no folder {html.parent} for the report: create it first")
    if not html.exists():
        return
    if not html.is_file() or GENERATOR.encode() not in _beginning(html):
        raise JobError(f"{html} exists and is no report: choose another FILE, or move it away")


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_BEGINNING_BYTES)
