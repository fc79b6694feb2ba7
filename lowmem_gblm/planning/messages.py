"""The sentences of a plan: why it was chosen, and what is missing if nothing fits."""

from collections.abc import Iterator, Sequence

from lowmem_gblm.planning.memory_use import TOKENIZING, Footprint, accumulator_bytes
from lowmem_gblm.planning.plan import Budget, Requirements
from lowmem_gblm.planning.sizes import Choices, Workload, slices_within, stores
from lowmem_gblm.planning.totals import DiskUse

_SHOWN_PARTS = 4


def gibibytes(count: int) -> str:
    """Return a number of bytes as text: "41.2 GiB", "3.5 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def reasons(work: Workload, choices: Choices, stored: DiskUse, room: int) -> Iterator[str]:
    """Yield a sentence for every choice that is not the one with room for everything."""
    if room:
        place = "all" if room >= stored.stored else gibibytes(room)
        yield (
            f"between passes {place} of {gibibytes(stored.stored)} is stored in host memory, for "
            f"lack of disk space: if this run is interrupted it has to start over"
        )
    if work.schedule.keeps_boundaries and choices.boundary_interval > 1:
        yield (
            f"of the boundaries every {_ordinal(choices.boundary_interval)} is kept and the others "
            f"are computed again, for lack of disk space"
        )
    if stores(work, choices) and choices.gradient_precision != "float32":
        bits = {"bfloat16": "bfloat16", "int8": "8 bit"}[choices.gradient_precision]
        yield (
            f"gradient magnitudes are stored in {bits}, for lack of disk space: "
            f"some decisions will be others than in float32"
        )
    if work.schedule.keeps_boundaries and choices.accumulator_bytes is not None:
        parts = len(slices_within(work.sizes.accumulators, choices.accumulator_bytes))
        yield (
            f"the gradients of a block are accumulated in {parts} parts of at most "
            f"{gibibytes(accumulator_bytes(work, choices))}, for lack of memory: each after the "
            f"first takes a forward and a backward pass more"
        )
    if work.sizes.depth == 1:
        return
    if not choices.read_ahead:
        yield "no block is read ahead, for lack of host memory: the computation waits for the disk"
    elif work.on_gpu and work.resident_bits is None and not choices.copy_ahead:
        yield "the next block is stored in host memory, for lack of GPU memory"


def refusal(
    work: Workload,
    minimum: Requirements,
    leanest: Sequence[Footprint],
    budget: Budget,
    fits: Sequence[str],
) -> str:
    """Return what is missing, its parts, and what would fit instead."""
    host = max(leanest, key=lambda at: at.host_bytes)
    gpu = max(leanest, key=lambda at: at.gpu_bytes)
    output, saved = work.sizes.total_bytes * work.writes, sum(work.saves)
    stored = max(0, minimum.disk_bytes - output - saved)
    disk = {"output": output, "stored between passes": stored, "saved statistics": saved}
    needs = (
        (f"host memory {_when(host)}", minimum.host_bytes, budget.host_bytes, host.host),
        (f"GPU memory {_when(gpu)}", minimum.gpu_bytes, budget.gpu_bytes, gpu.gpu),
        ("disk space", minimum.disk_bytes, budget.disk_bytes, disk),
    )
    missing = [
        f"this run needs at least {gibibytes(needed)} of {what}, {gibibytes(allowed)} may be used: "
        f"{_listed(parts)}"
        for what, needed, allowed, parts in needs
        if allowed is not None and needed > allowed
    ]
    if not missing:
        missing = [
            "neither host memory nor disk space alone is too small, but both together are: the "
            f"least is {gibibytes(minimum.host_bytes)} and {gibibytes(minimum.disk_bytes)}"
        ]
    last = "Fewer or shorter samples would not fit, either"
    if fits:
        last = f"It would fit with {' or '.join(fits)}"
    return ". ".join([*missing, f"{last}."])


def _when(at: Footprint) -> str:
    return "to tokenize the text" if at.name == TOKENIZING else f"in the stage {at.name}"


def _listed(parts: dict[str, int]) -> str:
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shown = [f"{gibibytes(size)} {name}" for name, size in largest[:_SHOWN_PARTS] if size]
    rest = sum(size for _, size in largest[_SHOWN_PARTS:])
    return ", ".join([*shown, *([f"{gibibytes(rest)} other things"] if rest else [])])


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0)
    return f"{number}{ending or 'th'}"
