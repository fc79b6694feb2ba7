"""Opening a model and limits of the machine: the options that every command has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lowmem_gblm.options import option, parse_bytes


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
        None, "folder for OUTPUT.work, what is stored between passes [that of OUTPUT]",
        identity=False, parse=Path, metavar="DIR",
    )  # fmt: skip

    @property
    def resident_kind(self) -> Literal["nf4", "int8"] | None:
        """Return the kind of packed matrices of the resident block; None if unpacked."""
        return None if self.compute_weights == "auto" else cast(Any, self.compute_weights)
