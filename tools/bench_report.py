"""The figures of a benchmark, from the measurements, and their tables.

FLOPs count the products with the matrices of the blocks, as everywhere in lowmem-gblm. The rate
that a run could have reached is that of these products alone, each kind as often as it occurs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench_model import Shape

# Of a division of FLOPs, less than this is rounding.
_LEAST = 1e-9
# How often a pass multiplies with every matrix, by the kinds of `matmul_rate`.
PASSES = {
    "dense": {"forward": 1},
    "reverse": {"forward": 1, "input": 1, "weight": 1},
}
IN_MEMORY = {"forward": 3, "input": 1, "weight": 1}
# How many plain forward passes of the model a pass is worth: products of either kind alike.
FORWARDS = {"dense": 1, "reverse": 3, "prune": 2}
READING_PASSES = ("dense", "reverse", "prune")
PEAKS = ("host_peak_bytes", "gpu_peak_bytes")
GIGA = 1e9
MEBI = 2**20

Rates = Mapping[str, Any]
Products = Mapping[str, int]
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job of a benchmark.

    Attributes:
        name: Name of the shape.
        shape: The sizes, with the number of blocks asked for.
        nsamples, seqlen: N samples of T tokens.
        dtype: Dtype of weights and computation.
        itemsize: Bytes of one number.
        activations: "pruned" or "dense".
    """

    name: str
    shape: Shape
    nsamples: int
    seqlen: int
    dtype: str
    itemsize: int
    activations: str

    @property
    def product_flops(self) -> int:
        """Return the FLOPs of one kind of product over all matrices and tokens: 2PD."""
        return 2 * self.shape.prunable * self.nsamples * self.seqlen

    def as_json(self) -> Figures:
        """Return all fields, and what follows from them."""
        rest = self.shape.rest_bytes(self.itemsize)
        return asdict(self) | {
            "prunable_weights": self.shape.prunable,
            "tokens": self.nsamples * self.seqlen,
            "model_bytes": rest + self.shape.block_bytes(self.itemsize),
        }


@dataclass(frozen=True)
class Measured:
    """A measured process: the JSON that it printed, and its seconds from start to end."""

    result: Figures
    wall_seconds: float


def mixed_rate(rates: Rates, products: Products) -> float:
    """Return FLOP/s for a mix of products, each with its number."""
    return sum(products.values()) / sum(count / rates[kind] for kind, count in products.items())


def reached(flops: float, seconds: float, products: Products, rates: Sequence[Rates]) -> Figures:
    """Return FLOP/s, and as a fraction of the mean of the measured rates."""
    possible = sum(mixed_rate(one, products) for one in rates) / len(rates)
    # A stage of a tiny model can end within the resolution of its clock.
    speed = flops / seconds if seconds else None
    return {
        "flops": flops,
        "flops_per_second": speed,
        "rate": possible,
        "fraction": speed / possible if speed else None,
    }


def products_of_passes(record: Figures, product_flops: int) -> dict[str, Products]:
    """Return the products of every pass; products not in `PASSES` are the prune sweep's."""
    found: dict[str, Products] = {
        name: products for name, products in PASSES.items() if name in record["seconds"]
    }
    left = record["flops"] / product_flops - sum(sum(one.values()) for one in found.values())
    return {**found, "prune": {"forward": left}} if left > _LEAST else found


def stage_figures(record: Figures, job: Job, rates: Sequence[Rates]) -> dict[str, Figures]:
    """Return seconds, share and wait for data of every stage, and the rate of its products."""
    seconds = dict(record["seconds"])
    total = seconds.pop("total")
    waited = record["waited_seconds"]
    stages = {
        name: {"seconds": s, "share": s / total, "waited": waited[name] / s if s else 0.0}
        for name, s in seconds.items()
    }
    for name, products in products_of_passes(record, job.product_flops).items():
        flops = job.product_flops * sum(products.values())
        stages[name] |= reached(flops, seconds[name], products, rates)
    return stages


def byte_figures(record: Figures, job: Job) -> Figures:
    """Return bytes moved and the least possible: blocks once per pass, the rest once; the model."""
    rest = job.shape.rest_bytes(job.itemsize)
    blocks = job.shape.block_bytes(job.itemsize)
    reads = sum(name in record["seconds"] for name in READING_PASSES)
    least = {"read_minimum": reads * blocks + rest, "written_minimum": blocks + rest}
    return {**record["bytes"], **least}


def run_figures(job: Job, run: Measured, rates: Sequence[Rates]) -> Figures:
    """Return the figures of a run of lowmem-gblm; ratios are to the plan and to the least."""
    record = run.result
    total = record["seconds"]["total"]
    every: dict[str, int] = {}
    for products in products_of_passes(record, job.product_flops).values():
        every = {kind: every.get(kind, 0) + products.get(kind, 0) for kind in {*every, *products}}
    return {
        "method": record["method"],
        "seconds": total,
        "wall_seconds": run.wall_seconds,
        **(reached(record["flops"], total, every, rates) if every else {}),
        "rates_at_its_products": [mixed_rate(one, every) for one in rates] if every else [],
        "stages": stage_figures(record, job, rates),
        "memory": record["memory"],
        "bytes": byte_figures(record, job),
        "device": record["device"],
        "versions": record["versions"],
    }


def baseline_figures(
    tool: str, method: str, run: Measured, ours: Figures, rates: Sequence[Rates]
) -> Figures:
    """Return the figures of a baseline; ratios are ours by theirs, below 1 if ours takes less."""
    theirs = run.result
    total = theirs["seconds"]["total"]
    peaks = {name: theirs[name] for name in PEAKS if theirs.get(name)}
    speed = reached(theirs["flops"], total, IN_MEMORY, rates) if "flops" in theirs else {}
    return {
        "tool": tool,
        "method": method,
        "seconds": total,
        "wall_seconds": run.wall_seconds,
        "stages": theirs["seconds"],
        **peaks,
        **speed,
        "ratios": {
            "seconds": ours["seconds"] / total,
            "wall_seconds": ours["wall_seconds"] / run.wall_seconds,
            **{name: ours["memory"][name] / peak for name, peak in peaks.items()},
        },
    }


def report(figures: Figures) -> list[str]:
    """Return the figures as lines of text."""
    job, run = figures["job"], figures["runs"][0]
    lines = [
        f"{job['name']}, {job['shape']['blocks']} blocks, {job['nsamples']} × {job['seqlen']} "
        f"tokens, {job['dtype']}, {run['method']}, activations {job['activations']}, on "
        f"{run['device']}, {figures['rates']['before']['threads']} threads",
        "",
        *stage_table(run),
        "",
        *rate_lines(figures["rates"], run),
        *plain_lines(figures["plain_passes"]),
        *use_lines(run),
    ]
    if figures["baselines"]:
        lines += ["", *baseline_table(figures)]
    return lines


def stage_table(run: Figures) -> list[str]:
    """Return a line per stage, then for the run, then for its process."""
    rows = [(name, one["seconds"], one) for name, one in run["stages"].items()]
    rows += [("total", run["seconds"], {"share": 1.0, **run})]
    rows += [("process", run["wall_seconds"], {})]
    lines = [("stage", "seconds", "share", "waited", "GFLOP/s", "of the rate")]
    for name, seconds, one in rows:
        speed = one.get("flops_per_second")
        lines.append(
            (
                name,
                f"{seconds:.2f}",
                f"{one['share']:.1%}" if "share" in one else "",
                f"{one['waited']:.1%}" if "waited" in one else "",
                f"{speed / GIGA:.1f}" if speed else "",
                f"{one['fraction']:.1%}" if speed else "",
            )
        )
    return columns(lines)


def rate_lines(rates: Mapping[str, Rates], run: Figures) -> list[str]:
    """Return the rates of the machine before and after, by kind of product."""
    lines = []
    for (when, one), mixed in zip(rates.items(), run["rates_at_its_products"], strict=False):
        kinds = ", ".join(
            f"{kind} {one[kind] / GIGA:.1f}" for kind in ("forward", "input", "weight")
        )
        lines.append(f"rate {when:8} {mixed / GIGA:.1f} GFLOP/s ({kinds})")
    return lines


def plain_lines(sweeps: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the sweeps as multiples of plain passes of the model in memory, measured in turns.

    First of as many forward passes as their arithmetic is worth, then of the passes that they make:
    of forward passes, and in the reverse sweep of a forward and a backward pass.
    """
    if not sweeps:
        return []
    forwards = {name: FORWARDS[name] * one["forward"] for name, one in sweeps.items()}
    passes = {name: one.get("backward", forwards[name]) for name, one in sweeps.items()}
    count = sum(FORWARDS[name] for name in sweeps)
    return [
        _multiples(sweeps, forwards, f"{count} forward passes in memory"),
        _multiples(sweeps, passes, "the same passes in memory"),
    ]


def _multiples(
    sweeps: Mapping[str, Mapping[str, float]], least: Mapping[str, float], what: str
) -> str:
    parts = ", ".join(f"{name} {one['seconds'] / least[name]:.2f}" for name, one in sweeps.items())
    ratio = sum(one["seconds"] for one in sweeps.values()) / sum(least.values())
    return f"in turns      {ratio:.2f} × {what} ({parts})"


def use_lines(run: Figures) -> list[str]:
    """Return peaks against the plan, and bytes against the least possible."""
    memory, moved = run["memory"], run["bytes"]
    pairs = (
        ("host peak", memory["host_peak_bytes"], memory["host_planned_bytes"], "planned"),
        ("gpu peak", memory["gpu_peak_bytes"], memory["gpu_planned_bytes"], "planned"),
        ("read", moved["read"], moved["read_minimum"], "at least"),
        ("written", moved["written"], moved["written_minimum"], "at least"),
    )
    return [
        f"{name:13} {used / MEBI:.1f} MiB, {what} {given / MEBI:.1f} MiB ({used / given:.3f})"
        for name, used, given, what in pairs
        if given
    ]


def baseline_table(figures: Figures) -> list[str]:
    """Return a line per baseline, then the ratios of ours by the same method to it."""
    measured = [name for name in PEAKS if any(name in one for one in figures["baselines"])]
    shown = [name.replace("_bytes", "").replace("_", " ") for name in measured]
    head = ["baseline", "method", "seconds", *(f"{name} MiB" for name in shown), "of the rate"]
    lines = [[*head, "ours/theirs: seconds", "process", *shown]]
    for one in figures["baselines"]:
        ratios = [one["ratios"].get(n) for n in ("seconds", "wall_seconds", *measured)]
        lines.append(
            [
                one["tool"],
                one["method"],
                f"{one['seconds']:.2f}",
                *(f"{one[name] / MEBI:.1f}" if name in one else "" for name in measured),
                f"{one['fraction']:.1%}" if one.get("fraction") else "",
                *(f"{ratio:.3f}" if ratio else "" for ratio in ratios),
            ]
        )
    return columns(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]))
    return [line.rstrip() for line in lines]
