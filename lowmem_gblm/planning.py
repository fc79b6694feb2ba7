"""What a run will take, by arithmetic alone: passes, bytes, FLOPs, memory; and whether it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowmem_gblm.errors import BudgetError
from lowmem_gblm.schedule import Schedule

FLOAT32_BYTES = 4
# Float tensors of one chunk of logits alive at once in the loss: logits, log-softmax, gradient.
_LOGITS_ALIVE = 4
# What the allocator holds beyond what is in use, as a factor of it.
_ALLOCATOR_SLACK = 1.15
# What Python and the libraries load on the way.
_PROCESS_BYTES = 20 << 20
# Tokenizer, text, and the code that reads them.
_TEXT_BYTES = 40 << 20
# Hidden-sized and feature-sized tensors of one sample that a block's graph holds on to.
_HIDDEN_ALIVE = 12


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that memory and work follow from.

    Attributes:
        block_bytes: Bytes on disk of every decoder block.
        rest_bytes: Bytes on disk of everything else the model uses.
        total_bytes: Bytes on disk of all tensors.
        prunable: Prunable weights of every block.
        active_fraction: Share of them that one token meets (below 1 where experts are routed).
        largest_matrix: Weights of the largest prunable matrix.
        widest_input: Inputs of the widest prunable matrix.
        feature_widths: Sum of the outputs of a block's prunable matrices that one token meets.
        hidden_size: Width of a boundary.
        vocab_size: Width of the logits.
    """

    block_bytes: tuple[int, ...]
    rest_bytes: int
    total_bytes: int
    prunable: tuple[int, ...]
    active_fraction: float
    largest_matrix: int
    widest_input: int
    feature_widths: int
    hidden_size: int
    vocab_size: int

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.block_bytes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done with the model.

    Attributes:
        schedule: The passes.
        needs: Statistics of the method.
        nsamples, seqlen: N and T.
        itemsize: Bytes of one number of the computation.
        on_gpu: Whether blocks are computed on a GPU.
        shares_memory: Whether a resident block shares the memory of what was read.
        logits_chunk: Logits computed at once.
    """

    schedule: Schedule
    needs: tuple[str, ...]
    nsamples: int
    seqlen: int
    itemsize: int
    on_gpu: bool
    shares_memory: bool
    logits_chunk: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes and FLOPs of a run.

    Attributes:
        passes: In order.
        host_bytes: Predicted peak of the process's resident memory.
        host_spill_bytes: How much of it holds what would otherwise wait in the work folder.
        gpu_bytes: Predicted peak on the GPU; 0 without one.
        spill_bytes: Most that lies in the work folder at once.
        output_bytes: Size of the new checkpoint.
        read_bytes: Tensor data read from the checkpoint.
        flops: Multiplications and additions with weights of decoder blocks.
    """

    passes: tuple[str, ...]
    host_bytes: int
    host_spill_bytes: int
    gpu_bytes: int
    spill_bytes: int
    output_bytes: int
    read_bytes: int
    flops: int

    @property
    def disk_bytes(self) -> int:
        """Most disk space taken at once: the output and the work folder."""
        return self.output_bytes + self.spill_bytes

    def as_json(self) -> dict[str, Any]:
        """The plan for `--json`."""
        return asdict(self) | {"passes": list(self.passes), "disk_bytes": self.disk_bytes}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that may be used; None where nobody said."""

    host_bytes: int | None = None
    gpu_bytes: int | None = None
    disk_bytes: int | None = None


def plan(sizes: ModelSizes, work: Work, base_bytes: int, budget: Budget) -> Plan:
    """Predict what a run will take.

    What waits between passes goes to the work folder, and into host memory as far as the person
    allowed for more of it than the passes need.

    Args:
        sizes: Of the model.
        work: To be done.
        base_bytes: Resident memory of the process before any tensor is loaded.
        budget: What may be used.
    """
    host, gpu = _memory(sizes, work)
    host = base_bytes + _PROCESS_BYTES + int(host * _ALLOCATOR_SLACK)
    host += _TEXT_BYTES * work.schedule.needs_samples
    spill = _spill(sizes, work)
    host_spill = min(spill, max(0, (budget.host_bytes or 0) - host))
    return Plan(
        passes=work.schedule.passes,
        host_bytes=host + host_spill,
        host_spill_bytes=host_spill,
        gpu_bytes=gpu,
        spill_bytes=spill - host_spill,
        output_bytes=sizes.total_bytes,
        read_bytes=_read(sizes, work),
        flops=_flops(sizes, work),
    )


def check_fits(made: Plan, budget: Budget) -> None:
    """Compare a plan with a budget.

    Raises:
        BudgetError: Names what is needed, what there is, and what could be done.
    """
    disk_parts = (
        f" {gibibytes(made.output_bytes)} output, {gibibytes(made.spill_bytes)} work folder."
        f" Fewer samples (--nsamples, or --windows of eval) make the work folder smaller."
    )
    for what, needed, allowed, way_out in (
        ("host memory", made.host_bytes, budget.host_bytes, ""),
        ("GPU memory", made.gpu_bytes, budget.gpu_bytes, " Try a smaller --seqlen."),
        ("disk space", made.disk_bytes, budget.disk_bytes, disk_parts),
    ):
        if allowed is not None and needed > allowed:
            raise BudgetError(
                f"this run needs {gibibytes(needed)} of {what}, {gibibytes(allowed)} may be used."
                + way_out
            )


def gibibytes(count: int) -> str:
    """A number of bytes as a person reads it: "41.2 GiB", "3.5 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _memory(sizes: ModelSizes, work: Work) -> tuple[int, int]:
    """Host and GPU bytes beyond the empty process: where it computes, and what waits beside."""
    block = max(sizes.block_bytes)
    computing = sizes.rest_bytes + _accumulators(sizes, work) + _working(sizes, work)
    read_ahead = block + block * (sizes.depth > 1)
    resident = 0 if work.shares_memory else max(sizes.prunable) * work.itemsize
    if work.on_gpu:
        return read_ahead + _accumulators(sizes, work), computing + resident
    return computing + resident + read_ahead, 0


def _accumulators(sizes: ModelSizes, work: Work) -> int:
    """float32 sums of one block."""
    total = 0
    if "gradient" in work.needs:
        total += max(sizes.prunable) * FLOAT32_BYTES
    if "gram" in work.needs:
        total += 4 * sizes.widest_input**2 * FLOAT32_BYTES
    return total


def _working(sizes: ModelSizes, work: Work) -> int:
    """What one sample, one decision or one chunk of logits takes while it is worked on."""
    deciding = 6 * sizes.largest_matrix * FLOAT32_BYTES
    forward = 0
    if work.schedule.needs_samples:
        widths = _HIDDEN_ALIVE * sizes.hidden_size + 3 * sizes.feature_widths
        forward = work.seqlen * widths * work.itemsize + sizes.largest_matrix * work.itemsize
    logits = 0
    if "head" in work.schedule.passes:
        rows = min(work.seqlen * sizes.vocab_size, max(work.logits_chunk, sizes.vocab_size))
        logits = _LOGITS_ALIVE * rows * FLOAT32_BYTES
    return max(deciding, forward, logits)


def _spill(sizes: ModelSizes, work: Work) -> int:
    """Boundaries and gradient magnitudes on disk at the fullest moment."""
    one = work.nsamples * work.seqlen * sizes.hidden_size * work.itemsize
    if not work.schedule.needs_samples:
        return 0
    if "reverse" not in work.schedule.passes:
        # Boundary 0, and of the sweep the one it reads and the one it writes.
        return 3 * one
    at_head = (sizes.depth + 2) * one
    if "prune" not in work.schedule.passes:
        return at_head
    gradients = sum(sizes.prunable) * FLOAT32_BYTES
    return max(at_head, gradients + 4 * one)


def _read(sizes: ModelSizes, work: Work) -> int:
    """Blocks once per pass; the rest once to compute with, and everything unpruned to copy."""
    in_blocks = sum(sizes.block_bytes)
    return work.schedule.reads * in_blocks + sizes.rest_bytes + sizes.total_bytes - in_blocks


def _flops(sizes: ModelSizes, work: Work) -> int:
    tokens = work.nsamples * work.seqlen
    weights = sum(sizes.prunable) * sizes.active_fraction
    return int(work.schedule.flops_per_parameter_and_token * weights * tokens)
