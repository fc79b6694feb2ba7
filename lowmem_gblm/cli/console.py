"""The text of results and progress for the user."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from lowmem_gblm.cli.streams import write
from lowmem_gblm.planning.messages import gibibytes

if TYPE_CHECKING:
    from lowmem_gblm.runtime.progress import Tick

_PLAIN_EVERY_S = 10.0
_TERMINAL_EVERY_S = 0.2
_CLEARED = "\r\x1b[K"


class Console:
    """A display of progress: one line that changes on a terminal, plain lines anywhere else.

    Plain lines come at the end of every stage, and at least every ten seconds. A write that fails,
    as to a terminal that was closed, ends the display and not the run.
    """

    def __init__(self, stream: TextIO | None, *, verbose: bool = False) -> None:
        self._stream = stream
        self._verbose = verbose
        self._silent = stream is None or stream.closed
        self._terminal = stream is not None and not self._silent and stream.isatty()
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def __call__(self, tick: Tick) -> None:
        """Show a step."""
        now = time.monotonic()
        since = min(now - self._last, tick.stage_s)
        if self._verbose:
            self._last = now
            self.announce(f"{progress_line(tick)}   {since:.3f} s")
            return
        pause = _TERMINAL_EVERY_S if self._terminal else _PLAIN_EVERY_S
        if since < pause and tick.step < tick.steps:
            return
        self._last = now
        line = progress_line(tick)
        self._write(f"{_CLEARED}{line}" if self._terminal else f"{line}\n")

    def announce(self, text: str) -> None:
        """Write what begins."""
        self._clear()
        self._write(f"{text}\n")

    def _clear(self) -> None:
        if self._terminal:
            self._write(_CLEARED)

    def _write(self, text: str) -> None:
        if self._silent:
            return
        try:
            write(self._stream, text)
        except OSError:
            self._silent = True


@contextmanager
def announced(console: Console, *, verbose: bool) -> Iterator[None]:
    """Run the body; what the package logs meanwhile is announced, with DEBUG for the verbose."""
    handler, log = _Announcing(console), logging.getLogger("lowmem_gblm")
    former = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    # Libraries may have set up handlers of their own.
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(former[0])
        log.propagate = former[1]


class _Announcing(logging.Handler):
    """A handler that announces messages on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.announce(record.getMessage())


def progress_line(tick: Tick) -> str:
    """Return a line such as "dense     12/80   0:03:20   peak 14.2 GiB   left 1:02:10"."""
    left = "" if tick.left_s is None else f"   left {clock(tick.left_s)}"
    steps = f"{tick.step}/{tick.steps}"
    return (
        f"{tick.stage:8} {steps:>9}   {clock(tick.stage_s)}   "
        f"peak {gibibytes(tick.peak_bytes)}{left}"
    )


def clock(seconds: float) -> str:
    """Return seconds as "1:02:10"."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def prune_lines(record: dict[str, Any], output: str, saved: Path | None) -> list[str]:
    """Return the lines that `prune` prints when it is done; `saved` statistics are in a folder."""
    used = record["memory"]
    gpu = f", {gibibytes(used['gpu_peak_bytes'])} GPU" if used["gpu_peak_bytes"] else ""
    return [
        *(f"note: {note}" for note in record["notes"]),
        f"pruned {len(record['tensors'])} tensors with {record['method']} to "
        f"{record['sparsity_measured']:.2%} zeros in {record['seconds']['total']:.1f} s, "
        f"peak {gibibytes(used['host_peak_bytes'])} host memory{gpu}",
        *([] if saved is None else [f"the statistics are {saved}"]),
        f"the checkpoint is {output}",
    ]


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """Return a plan as a small table."""
    rows = {
        "stages": " → ".join(plan["stages"]),
        "host memory": _at_least(plan, "host_bytes"),
        "GPU memory": _at_least(plan, "gpu_bytes") if plan["predicted"]["gpu_bytes"] else "none",
        "disk space": _at_least(plan, "disk_bytes"),
        "of that": ", ".join(_folders(plan)),
        "read": gibibytes(plan["read_bytes"]),
        "written": gibibytes(plan["written_bytes"]),
        "arithmetic": f"{plan['flops'] / 1e12:.3g} TFLOP",
    }
    if plan["choices"]["durable_interval"] > 1:
        rows["durable"] = f"every {plan['choices']['durable_interval']} blocks: a resumed run "
        rows["durable"] += "repeats the blocks after the last such one"
    if plan["seconds"] is not None:
        parts = ", ".join(f"{name} {clock(seconds)}" for name, seconds in plan["seconds"].items())
        stage, rate = plan["disk_rate"]
        rows["disk speed"] = f"{gibibytes(rate)}/s are enough; {stage} needs the most"
        rows["time"] = f"about {clock(plan['total_seconds'])} ({parts})"
    else:
        rows["time"] = "not known: the device is not here to be measured"
    return [*(f"{name:12} {value}" for name, value in rows.items()), *plan["reasons"]]


def tensor_lines(tensors: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a line for every tensor: its name and its shape."""
    cells = [(name, " × ".join(map(str, shape))) for name, shape in tensors.items()]
    return table_lines(cells, left=(0,))


def _folders(plan: dict[str, Any]) -> Iterator[str]:
    yield f"{gibibytes(plan['output_bytes'])} output"
    yield f"{gibibytes(plan['spill_bytes'])} work folder at its fullest"
    if plan["statistics_bytes"]:
        yield f"{gibibytes(plan['statistics_bytes'])} saved statistics"


def _at_least(plan: dict[str, Any], name: str) -> str:
    needed, least = plan["predicted"][name], plan["minimum"][name]
    return f"{gibibytes(needed)} (at least {gibibytes(least)})"


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines that `eval` prints: perplexity, a table of tasks, or both."""
    lines = []
    if "perplexity" in result:
        lines.append(
            f"perplexity {result['perplexity']:.4f} on {result['text']} "
            f"({result['windows']} windows of {result['seqlen']} tokens)"
        )
    if "results" in result:
        lines += table_lines(
            [("task", "shots", "metric", "value", "stderr"), *_task_cells(result)], left=(0, 2)
        )
    return lines


def _task_cells(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of every metric of every task; a name such as "acc,none" has a filter."""
    for task, values in result["results"].items():
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            label = metric if kind == "none" else name
            stderr = values.get(f"{metric}_stderr,{kind}")
            shots = str(result["n-shot"].get(task, ""))
            yield task, shots, label, _four(value), _four(stderr)


def _four(value: object) -> str:
    """Return a number with four digits; the harness has "N/A" where there is none."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""


def pack_lines(result: dict[str, Any]) -> list[str]:
    """Return the line that `pack` prints when it is done."""
    before, after = result["bytes"], result["packed_bytes"]
    return [
        f"packed {result['masked_tensors']} of {result['tensors']} tensors: "
        f"{gibibytes(before)} became {gibibytes(after)}, {after / before:.2%}; the packed "
        f"checkpoint is {result['packed']}"
    ]


def unpack_lines(result: dict[str, Any]) -> list[str]:
    """Return the line that `unpack` prints when it is done."""
    return [
        f"unpacked {result['files']} files, {gibibytes(result['bytes'])}, each with the SHA-256 "
        f"that it had before; the checkpoint is {result['output']}"
    ]


def table_lines(lines: Sequence[tuple[str, ...]], left: Sequence[int]) -> list[str]:
    """Return lines of aligned cells; `left` are the columns of text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
