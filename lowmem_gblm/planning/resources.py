"""Opening a model and limits of the machine: the options that every command has.

A field that is declared with `option` is an option of the command line, of the Python API and of
the record of a run.
"""

from __future__ import annotations

import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from lowmem_gblm.errors import RequestError

_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(text: str) -> int:
    """Return the bytes meant by "22GiB", "24g" or "800MB" (KiB and K are 1024 bytes, KB is 1000).

    Raises:
        RequestError: The text is no size, or a number without a unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is not None and not match[2]:
        raise RequestError(f"a size needs a unit: {match[1]}GiB, {match[1]}MiB or {match[1]}B?")
    if match is None or match[2].lower() not in _UNITS:
        raise RequestError(f"a size reads like 22GiB or 800MB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def option(
    default: Any,
    help: str,
    *,
    identity: bool = True,
    choices: tuple[str, ...] = (),
    parse: type | Any = str,
    metavar: str | None = None,
    repeat: bool = False,
) -> Any:
    """Return the field of a request for an option.

    Args:
        default: The value without the option.
        help: One line for `--help`.
        identity: Whether another value gives another result.
        choices: The values allowed, if they can be listed.
        parse: A function from the typed string to the value.
        metavar: Placeholder in `--help`.
        repeat: Whether the option may be given several times.
    """
    metadata = {
        "help": help, "identity": identity, "choices": choices, "parse": parse,
        "metavar": metavar, "repeat": repeat,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def options(request_class: type) -> list[Field[Any]]:
    """Return the fields that were declared with `option`."""
    return [one for one in fields(request_class) if "help" in one.metadata]


def check_choices(request: object) -> None:
    """Raise `RequestError` for a value that is not among the choices of its field."""
    for one in options(type(request)):
        value, choices = getattr(request, one.name), one.metadata["choices"]
        if choices and value not in choices:
            raise RequestError(
                f"--{one.name.replace('_', '-')} must be one of {', '.join(choices)}; got {value!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The options for opening a model, and the limits of the machine."""

    device: str = option("auto", "where to compute: auto, cpu, cuda, cuda:1", metavar="DEVICE")
    dtype: str = option(
        "auto",
        "precision of the computation; auto: the checkpoint's, and float32 for float16 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compute_weights: str = option(
        "auto",
        "how the matrices of the resident block are held to compute statistics with; nf4 and int8 "
        "take less GPU memory, and give other statistics; the masks go to the weights on disk",
        choices=("auto", "nf4", "int8"),
    )
    trust_remote_code: bool = option(
        False, "run Python code that comes with the checkpoint; it can do whatever you can",
        parse=bool,
    )  # fmt: skip
    gpu_memory: int | None = option(
        None, "GPU memory to use at most, as 22GiB [what is free]", identity=False,
        parse=parse_bytes, metavar="SIZE",
    )  # fmt: skip
    cpu_memory: int | None = option(
        None, "host memory to use at most, as 48GiB [what is free]", identity=False,
        parse=parse_bytes, metavar="SIZE",
    )  # fmt: skip
    disk: int | None = option(
        None, "disk space to use at most, as 200GiB [what is free]", identity=False,
        parse=parse_bytes, metavar="SIZE",
    )  # fmt: skip
    work_dir: Path | None = option(
        None, "folder for what is stored between passes [OUTPUT.work]", identity=False, parse=Path,
        metavar="DIR",
    )  # fmt: skip

    @property
    def resident_kind(self) -> Literal["nf4", "int8"] | None:
        """Return the kind of packed matrices of the resident block; None if unpacked."""
        return None if self.compute_weights == "auto" else cast(Any, self.compute_weights)
