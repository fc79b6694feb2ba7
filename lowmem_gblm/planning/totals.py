"""Totals of the table of steps: FLOPs, bytes read from the checkpoint, bytes written."""

from collections.abc import Sequence

from lowmem_gblm.planning.disk_use import key_bytes
from lowmem_gblm.planning.sizes import Choices, ModelSizes, Workload
from lowmem_gblm.planning.steps import Step


def step_flops(step: Step, sizes: ModelSizes, work: Workload) -> int:
    """Return the multiplications and additions of a step with weights of its block."""
    if step.block is None:
        return 0
    weights = sizes.prunable[step.block] * sizes.active_fraction
    return int(step.flops_per_weight_and_token * weights * work.nsamples * work.seqlen)


def step_reads(step: Step, sizes: ModelSizes) -> int:
    """Return the bytes that a step reads from the checkpoint."""
    if step.stage in ("embed", "head"):
        return sizes.rest_bytes
    blocks = sizes.block_bytes if step.block is None else sizes.block_bytes[step.block :][:1]
    return sum(blocks) * bool(step.loads)


def read_bytes(table: Sequence[Step], sizes: ModelSizes, work: Workload) -> int:
    """Return the bytes read from the checkpoint; in place, all are read once more for hashes."""
    copied = (sizes.total_bytes - sum(sizes.block_bytes)) * work.writes
    checked = sizes.total_bytes * work.rewrites
    return sum(step_reads(step, sizes) for step in table) + copied + checked


def written_bytes(
    table: Sequence[Step], sizes: ModelSizes, work: Workload, choices: Choices
) -> int:
    """Return what a run writes to the output and to the work folder."""
    stored = sum(key_bytes(key, sizes, work, choices) for step in table for key in step.writes)
    blocks = sum(sizes.block_bytes[step.block or 0] for step in table if step.prunes)
    rest = sizes.total_bytes - sum(sizes.block_bytes)
    return stored + (blocks + rest) * work.writes + 2 * blocks * work.rewrites
