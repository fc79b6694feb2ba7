"""What a plan chooses, what it predicts, and what it says where nothing fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_gblm.commands.estimate import decision_cost
from lowmem_gblm.errors import BudgetError
from lowmem_gblm.methods import find_method
from lowmem_gblm.planning.plan import Budget
from lowmem_gblm.planning.planner import largest_interval, plan
from lowmem_gblm.planning.run_time import MachineSpeed, disk_rate, run_time
from lowmem_gblm.planning.schedule import Schedule, schedule
from lowmem_gblm.planning.sizes import (
    STORES,
    ActivationCost,
    Choices,
    ModelSizes,
    Workload,
    slices_within,
)
from lowmem_gblm.planning.totals import DiskUse, disk_use, written_bytes
from lowmem_gblm.sweeps.statistics import needed_statistics

MIB, GIB = 1 << 20, 1 << 30
BASE = 350 * MIB
# Llama-2-70B in bfloat16.
WIDTH, FFN, KV = 8192, 28672, 1024
SLOTS = (WIDTH * WIDTH, WIDTH * KV, WIDTH * KV, WIDTH * WIDTH, *[WIDTH * FFN] * 3)
SIZES = ModelSizes(
    block_bytes=(2 * sum(SLOTS),) * 80,
    rest_bytes=4 * 32000 * WIDTH,
    rest_weights=2 * 32000 * WIDTH,
    total_bytes=2 * 80 * sum(SLOTS) + 4 * 32000 * WIDTH,
    side_bytes=0,
    prunable=(sum(SLOTS),) * 80,
    slots=SLOTS,
    squared_inputs=3 * WIDTH**2 + FFN**2,
    columns=6 * WIDTH + FFN,
    active_fraction=1.0,
    largest_matrix=WIDTH * FFN,
    widest_input=FFN,
    feature_widths=3 * WIDTH + 2 * KV + 2 * FFN,
    hidden_size=WIDTH,
    heads=64,
    attention_matrices=False,
    vocab_size=32000,
)


def schedule_of(method: str, activations: str = "pruned", **more: bool) -> Schedule:
    found = find_method(method)
    needed = needed_statistics(found.needs_with(found.options()))
    return schedule(
        activations, needs_backward=needed.gradient is not None,
        needs_forward=bool(needed.activations), **more,
    )  # fmt: skip


def work(method: str = "gblm", activations: str = "pruned", **changes: object) -> Workload:
    made = Workload(
        sizes=SIZES,
        process_bytes=BASE,
        schedule=schedule_of(method, activations),
        activations=ActivationCost(
            entries=SIZES.squared_inputs,
            largest_entries=FFN**2,
            flops_per_token=2 * SIZES.squared_inputs,
        )
        if method == "sparsegpt"
        else ActivationCost(),
        deciding=decision_cost(find_method(method)),
        nsamples=128,
        seqlen=2048,
        itemsize=2,
        on_gpu=True,
        shares_memory=False,
        resident_bits=None,
        logits_chunk=1 << 24,
        tile=1 << 26,
        slab=1 << 24,
    )
    return replace(made, **changes)


def used(choices: Choices, **changes: object) -> DiskUse:
    """Return what a run of 70B stores, with these choices."""
    return disk_use(work(**changes), choices)


ANYTHING = Budget()
# Enough for the fastest plan, with nothing left over to stand in for the disk.
HOST = 9 * GIB


def made(budget: Budget = ANYTHING, **changes: object):
    return plan(work(**changes), budget)


def test_with_room_for_everything_nothing_is_done_twice() -> None:
    found = made()
    assert found.choices.boundary_interval == 1
    assert found.choices.accumulator_bytes is None
    assert found.choices.gradient_precision == "float32"
    assert found.choices.read_ahead
    assert found.choices.copy_ahead
    assert found.reasons == ()
    assert found.flops == (12 * 80 - 2) * sum(SLOTS) * 128 * 2048


def test_the_figures_of_the_design_for_70b() -> None:
    found = made()
    boundary = 128 * 2048 * WIDTH * 2
    assert boundary == 4 * GIB
    assert found.boundary_bytes == pytest.approx(82 * boundary, rel=0.02)
    assert found.magnitude_bytes == 4 * 80 * sum(SLOTS)
    assert 8 * GIB < found.predicted.gpu_bytes < 22 * GIB


def test_less_disk_takes_recomputed_boundaries_before_it_rounds_gradients() -> None:
    whole = made().predicted.disk_bytes
    less = made(Budget(disk_bytes=whole - 40 * GIB, host_bytes=HOST))
    assert less.choices.boundary_interval > 1
    assert less.choices.gradient_precision == "float32"
    assert "computed again" in less.reasons[0]
    assert less.flops > made().flops


def test_still_less_disk_rounds_gradients_and_says_so() -> None:
    stores = []
    for disk in (300 * GIB, 150 * GIB, made().minimum.disk_bytes):
        found = made(Budget(disk_bytes=disk, host_bytes=HOST))
        assert found.predicted.disk_bytes <= disk
        stores.append(found.choices.gradient_precision)
    assert stores == ["float32", "bfloat16", "int8"]
    assert any("8 bit" in reason and "other" in reason for reason in found.reasons)


def test_host_memory_is_used_where_the_disk_does_not_suffice() -> None:
    assert made(Budget(host_bytes=1000 * GIB)).host_spill_bytes == 0
    smallest = made().minimum.disk_bytes
    found = made(Budget(host_bytes=1000 * GIB, disk_bytes=smallest))
    assert found.choices.boundary_interval == 1
    assert 0 < found.host_spill_bytes < 1000 * GIB
    assert found.predicted.disk_bytes <= smallest


@pytest.mark.parametrize(("gpu", "changed"), [(24, False), (12, False), (8, True), (6, True)])
def test_a_smaller_gpu_changes_the_plan_and_is_kept_to(gpu: int, changed: bool) -> None:
    found = made(Budget(gpu_bytes=gpu * GIB))
    assert found.predicted.gpu_bytes <= gpu * GIB
    assert bool(found.reasons) == changed


def test_accumulators_come_in_parts_where_they_do_not_fit() -> None:
    least = made().minimum.gpu_bytes
    found = made(Budget(gpu_bytes=least))
    assert found.choices.accumulator_bytes >= 4 * WIDTH * FFN
    parts = len(slices_within([4 * slot for slot in SLOTS], found.choices.accumulator_bytes))
    assert f"in {parts} parts" in " ".join(found.reasons)
    assert found.flops == made().flops + (parts - 1) * 4 * 80 * sum(SLOTS) * 128 * 2048


def test_the_order_of_sacrifices_in_host_memory() -> None:
    seen = []
    cpu = {"on_gpu": False, "shares_memory": True, "itemsize": 4}
    limit = made(**cpu).predicted.host_bytes
    while True:
        try:
            choices = made(Budget(host_bytes=limit), **cpu).choices
        except BudgetError:
            break
        seen.append((choices.accumulator_bytes is None, choices.read_ahead, choices.behind_bytes))
        limit -= 250 * MIB
    whole, ahead, behind = zip(*dict.fromkeys(seen), strict=True)
    assert sorted(behind[:3], reverse=True) == list(behind[:3])
    assert ahead[0]
    assert not ahead[-1]
    assert whole[0]
    assert not whole[-1]


@pytest.mark.parametrize("method", ["gblm", "wanda", "sparsegpt", "magnitude"])
def test_the_least_depends_neither_on_depth_nor_on_samples(method: str) -> None:
    shallow = replace(SIZES, block_bytes=SIZES.block_bytes[:4], prunable=SIZES.prunable[:4])
    few = made(sizes=shallow, method=method, nsamples=2).minimum
    many = made(method=method, nsamples=512).minimum
    assert (few.host_bytes, few.gpu_bytes) == (many.host_bytes, many.gpu_bytes)


@pytest.mark.parametrize("method", ["gblm", "gradient", "wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_least_is_enough_and_a_byte_less_is_not(
    method: str, activations: str, on_gpu: bool
) -> None:
    options = {"method": method, "activations": activations, "on_gpu": on_gpu}
    least = made(**options).minimum
    for name in ("host_bytes", "disk_bytes", *["gpu_bytes"] * on_gpu):
        amount = getattr(least, name)
        found = made(Budget(**{name: amount}), **options)
        assert getattr(found.predicted, name) <= amount
        # Where host memory is left over, it could stand in for the disk.
        least_host = {"host_bytes": least.host_bytes}
        with pytest.raises(BudgetError):
            made(Budget(**least_host | {name: amount - 1}), **options)


def test_a_refusal_lists_the_parts_and_what_would_fit() -> None:
    least = made().minimum.gpu_bytes
    with pytest.raises(BudgetError) as caught:
        made(Budget(gpu_bytes=least - MIB))
    sentence = str(caught.value)
    assert re.search(r"at least [0-9.]+ GiB of GPU memory in the stage (reverse|prune)", sentence)
    assert "may be used: " in sentence
    assert "resident block" in sentence
    shorter = " or ".join(f"--seqlen {seqlen}" for seqlen in (1024, 512, 256, 128))
    assert f"It would fit with {shorter} or --compute-weights nf4." in sentence


@pytest.mark.parametrize("option", ["--nsamples {}", "--windows {}"])
def test_a_refusal_names_the_option_of_the_command(option: str) -> None:
    least = made().minimum
    short = Budget(host_bytes=least.host_bytes, disk_bytes=least.disk_bytes - MIB)
    with pytest.raises(BudgetError, match=f"It would fit with .* or {option.format(64)} or"):
        made(short, samples_option=option)


def test_a_refusal_says_when_nothing_helps() -> None:
    with pytest.raises(
        BudgetError, match=r"31\.0 KiB may be used.*Fewer or shorter samples would not"
    ):
        made(Budget(host_bytes=31 << 10))


def test_boundaries_and_gradients_never_wait_all_at_the_same_time() -> None:
    stored = used(Choices())
    assert stored.stored < stored.boundaries + stored.magnitudes
    # While shards are written, gradient magnitudes go.
    assert stored.on_disk(0) < stored.stored + SIZES.total_bytes


def test_every_ninth_boundary_of_70b_takes_what_the_design_says() -> None:
    stored = used(Choices(boundary_interval=9))
    assert stored.boundaries == pytest.approx(72 * GIB, rel=0.15)


def test_time_follows_the_machine_and_what_is_done_twice() -> None:
    speed = MachineSpeed(flops_s=100e12, memory_bytes_s=1e12, read_bytes_s=3e9, write_bytes_s=2e9)
    half = replace(speed, flops_s=50e12)
    fast = plan(work(), Budget(), speed=speed)
    slow = plan(work(), Budget(), speed=half)
    tight = plan(work(), Budget(gpu_bytes=6 * GIB), speed=speed)
    assert set(fast.seconds) == {*fast.stages, "finish"}
    # 215 PFLOP at 100 TFLOP/s are 36 minutes.
    assert 36 * 60 < fast.total_seconds < 60 * 60
    assert fast.total_seconds < slow.total_seconds < 2 * fast.total_seconds
    assert tight.total_seconds > fast.total_seconds


@pytest.mark.parametrize("method", ["gblm", "wanda", "sparsegpt"])
def test_reading_and_writing_cost_time_only_where_the_computation_does_not_hide_them(
    method: str,
) -> None:
    def seconds(*, read_ahead: bool, flops_s: float, disk_bytes_s: float) -> float:
        speed = MachineSpeed(
            flops_s=flops_s,
            memory_bytes_s=1e30,
            read_bytes_s=disk_bytes_s,
            write_bytes_s=disk_bytes_s,
        )
        return sum(run_time(work(method), Choices(read_ahead=read_ahead), speed).values())

    computing = seconds(read_ahead=True, flops_s=1e12, disk_bytes_s=1e30)
    moving = seconds(read_ahead=False, flops_s=1e30, disk_bytes_s=1e9)
    moving -= seconds(read_ahead=False, flops_s=1e30, disk_bytes_s=1e30)
    both = seconds(read_ahead=False, flops_s=1e12, disk_bytes_s=1e9)
    assert both == pytest.approx(computing + moving)
    assert seconds(read_ahead=True, flops_s=1e12, disk_bytes_s=1e9) < both
    assert seconds(read_ahead=True, flops_s=1e12, disk_bytes_s=1e9) >= max(computing, moving)


@pytest.mark.parametrize("method", ["gblm", "wanda", "magnitude"])
def test_with_a_disk_of_the_rate_that_is_named_no_sweep_waits(method: str) -> None:
    def seconds(disk_bytes_s: float) -> dict[str, float]:
        disk = {"read_bytes_s": disk_bytes_s, "write_bytes_s": disk_bytes_s}
        return run_time(job, choices, replace(speed, **disk))

    job, choices = work(method), Choices()
    speed = MachineSpeed(flops_s=1e12, memory_bytes_s=1e11, read_bytes_s=1, write_bytes_s=1)
    stage, rate = disk_rate(job, choices, speed)
    sweeps = {"dense", "reverse", "prune"}.intersection(job.schedule.stages)
    assert all(seconds(rate)[one] == pytest.approx(seconds(1e30)[one]) for one in sweeps)
    assert seconds(0.9 * rate)[stage] > 1.1 * seconds(1e30)[stage]


def test_what_is_held_in_host_memory_asks_nothing_of_the_disk() -> None:
    job = replace(work("gblm"), on_gpu=True)
    speed = MachineSpeed(flops_s=1e30, memory_bytes_s=1e30, read_bytes_s=1e9, write_bytes_s=1e9)
    every, third = (run_time(job, Choices(durable_interval=n), speed) for n in (1, 3))
    assert third["prune"] < every["prune"]


def test_within_less_disk_boundaries_in_between_are_held_and_half_is_written() -> None:
    job = replace(work("gblm"), on_gpu=True)
    every_step_durable = written_bytes(job, Choices())
    found = plan(job, Budget(disk_bytes=300 * 10**9, host_bytes=24 * GIB))
    assert found.choices.boundary_interval == 2
    assert found.written_bytes < 0.51 * every_step_durable


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_dry_run_reads_every_block_and_runs_a_sample_where_there_is_one(method: str) -> None:
    in_place = schedule_of(method, in_place=True)
    changes = {"schedule": in_place, "writes": False, "rewrites": True}
    reading, running = (
        plan(work(method, **changes), Budget(), speed=speed).seconds["dry_run"]
        for speed in (
            MachineSpeed(flops_s=1e20, memory_bytes_s=1e20, read_bytes_s=3e9, write_bytes_s=2e9),
            MachineSpeed(flops_s=1e9, memory_bytes_s=1e20, read_bytes_s=1e20, write_bytes_s=1e20),
        )
    )
    assert reading == pytest.approx(sum(SIZES.block_bytes) / 3e9, rel=0.2)
    assert (running > 60) == (method == "wanda")


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(1, 60),
    precision=st.sampled_from(list(STORES)),
    nsamples=st.integers(1, 256),
    activations=st.sampled_from(["pruned", "dense"]),
)
def test_no_larger_interval_of_boundaries_needs_less_disk(
    depth: int, precision: str, nsamples: int, activations: str
) -> None:
    sizes = replace(SIZES, block_bytes=SIZES.block_bytes[:depth], prunable=SIZES.prunable[:depth])
    made = work("gblm", activations, nsamples=nsamples, sizes=sizes)

    def needed(interval: int) -> int:
        choices = Choices(boundary_interval=interval, gradient_precision=precision)
        return disk_use(made, choices).on_disk(0)

    tried = min(map(needed, range(1, largest_interval(depth) + 1)))
    assert tried == min(map(needed, range(1, depth + 1)))


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        (None, [[0, 1, 2, 3]]),
        (5, [[0, 1], [2], [3]]),
        (7, [[0, 1], [2, 3]]),
        (1, [[0], [1], [2], [3]]),
    ],
)
def test_slices_keep_order_and_limit(limit: int | None, parts: list[list[int]]) -> None:
    assert slices_within([2, 3, 4, 3], limit) == parts


def test_experts_in_half_precision_on_a_cpu_take_memory_for_compiled_products() -> None:
    experts = replace(SIZES, active_fraction=0.3)
    on_cpu = {"on_gpu": False, "shares_memory": True}

    def host(**changes: object) -> int:
        return made(**(on_cpu | changes)).predicted.host_bytes

    assert host(sizes=experts) - host() > 120 * MIB
    assert host(sizes=experts, itemsize=4) == host(itemsize=4)
    assert "compiled products" not in made(sizes=experts).footprints[0].host
    assert host(sizes=experts, method="magnitude") == host(method="magnitude")


def test_layouts_are_in_the_memory_of_where_attention_is() -> None:
    for on_gpu in (True, False):
        plain, masked = (made(on_gpu=on_gpu, layout_bytes=size).predicted for size in (0, GIB))
        assert masked.gpu_bytes - plain.gpu_bytes == GIB * on_gpu
        assert masked.host_bytes - plain.host_bytes == GIB * (not on_gpu)
