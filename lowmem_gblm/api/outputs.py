"""Functions that read pruned models, and write them in another form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_gblm.api.arguments import Place, checked_listener
from lowmem_gblm.options import as_path

if TYPE_CHECKING:
    from lowmem_gblm.runtime.progress import Listener


def verify(
    output: Place, against: Place | None = None, *, listener: Listener | None = None
) -> dict[str, Any]:
    """Prove that `output` keeps its promises; `against` is the dense model it was pruned from.

    Args:
        output: Folder made by `prune`.
        against: The model it was made from, or None.
        listener: Called with a `Tick` after every step, as by `ProgressBar()`.

    Raises:
        VerificationError: A promise is broken; names the first violations.
        LowmemGblmError: A folder cannot be read.
    """
    from lowmem_gblm.commands.verify import verify as run

    dense = None if against is None else as_path("against", against)
    return run(as_path("OUTPUT", output), dense, checked_listener(listener))


def report(
    output: Place,
    against: Place | Iterable[Place] = (),
    html: Place | None = None,
    *,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Measure the structure of the masks of `output`, and of others of the same model beside it.

    Args:
        output: Folder made by `prune`.
        against: Another such folder, or several.
        html: File for a page that shows the numbers; an earlier report there is replaced.
        listener: Called with a `Tick` after every step, as by `ProgressBar()`.

    Raises:
        LowmemGblmError: A folder is no output, or one of another model, or the page cannot be
            written there.
    """
    from lowmem_gblm.commands.report.pipeline import report as run

    others = (
        against if isinstance(against, Iterable) and not isinstance(against, str) else [against]
    )
    paths = [as_path("against", one) for one in others]
    page = None if html is None else Path(as_path("html", html))
    return run(as_path("OUTPUT", output), paths, page, checked_listener(listener))


def pack(output: Place, packed: Place, *, listener: Listener | None = None) -> dict[str, Any]:
    """Write a checkpoint without its zeros to the new folder `packed`; return sizes and counts.

    Args:
        output: Folder, or Hub id, of a safetensors checkpoint; it stays as it is.
        packed: Folder to create. Models cannot be loaded from it.
        listener: Called with a `Tick` after every shard, as by `ProgressBar()`.

    Raises:
        LowmemGblmError: A file cannot be read or written, or is not as pruning.json says; nothing
            is left under the name `packed`.
    """
    from lowmem_gblm.commands.pack import pack as run

    place = Path(as_path("PACKED", packed))
    return run(as_path("OUTPUT", output), place, checked_listener(listener))


def unpack(packed: Place, output: Place, *, listener: Listener | None = None) -> dict[str, Any]:
    """Write the checkpoint that `pack` was given to the new folder `output`, byte for byte.

    Args:
        packed: Folder made by `pack`, or a Hub id of such.
        output: Folder to create.
        listener: Called with a `Tick` after every shard, as by `ProgressBar()`.

    Raises:
        LowmemGblmError: A file is missing or damaged, which is named, or cannot be written; nothing
            is left under the name `output`.
    """
    from lowmem_gblm.commands.pack import unpack as run

    place = Path(as_path("OUTPUT", output))
    return run(as_path("PACKED", packed), place, checked_listener(listener))


def upload(
    output: Place,
    repo: str,
    *,
    against: Place | None = None,
    public: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Verify `output`, as `verify` does, and upload it to `repo` on the Hub.

    Args:
        output: Folder made by `prune`.
        repo: Name of a repository, as "you/name". A new one is private unless it is to be `public`.
        against: The dense model that `output` was pruned from, or None.
        listener: Called with a `Tick` after every step of the verification, as by `ProgressBar()`.

    Raises:
        VerificationError: A promise is broken; nothing is uploaded.
        LowmemGblmError: There is no token, or the Hub refuses.
    """
    from lowmem_gblm.commands.upload import upload as run

    dense = None if against is None else as_path("against", against)
    folder, name = as_path("OUTPUT", output), as_path("REPO", repo)
    return run(folder, name, dense, checked_listener(listener), public=public)
