"""The device layer, with a module in the place of torch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_gblm.errors import BudgetError, RequestError
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.runtime import accelerator
from lowmem_gblm.runtime.accelerator import CONTEXT_BYTES, CPU, CopyStream

GIB = 1 << 30
GPU = torch.device("cuda", 0)


class Module(SimpleNamespace):
    """What torch has for a kind of device: 24 GiB, of which 10 are free."""

    def __init__(self) -> None:
        super().__init__(
            free=10 * GIB, reserved=2 * GIB, emulates=False, count=2, fractions=[], emptied=0
        )

    def device_count(self) -> int:
        return int(self.count)

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool) -> bool:
        return including_emulation or not self.emulates

    def get_device_name(self, device: Any) -> str:
        return f"Card {device.index}"

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free, 24 * GIB

    def memory_reserved(self, device: Any) -> int:
        return int(self.reserved)

    def max_memory_reserved(self, device: Any) -> int:
        return 3 * GIB

    def reset_peak_memory_stats(self, device: Any) -> None:
        """Nothing to reset."""

    def empty_cache(self) -> None:
        self.emptied += 1

    def get_per_process_memory_fraction(self, device: Any) -> float:
        return 1.0

    def set_per_process_memory_fraction(self, fraction: float, device: Any) -> None:
        self.fractions.append(fraction)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    made = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: made)
    return made


def test_a_run_is_limited_context_included(module: Module) -> None:
    with accelerator.run_on(GPU, 12 * GIB):
        assert module.fractions == [(12 * GIB - CONTEXT_BYTES) / (24 * GIB)]
    assert module.fractions[1:] == [1.0]
    with accelerator.run_on(GPU, 100 * GIB):
        assert module.fractions[2:] == [1.0]


def test_a_limit_that_the_driver_alone_takes_is_refused(module: Module) -> None:
    said = r"0\.25 GiB of GPU .* the driver itself takes about 0\.50 GiB"
    with pytest.raises(BudgetError, match=said), accelerator.run_on(GPU, GIB // 4):
        pass


def test_products_are_exact_in_a_run_and_as_before_after_an_error(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        with suppress(KeyError), accelerator.run_on(GPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not matmul.allow_bf16_reduced_precision_reduction
            assert not matmul.allow_fp16_reduced_precision_reduction
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_run_on_a_cpu_changes_nothing() -> None:
    with accelerator.run_on(CPU, 1):
        assert accelerator.peak_bytes(CPU) == accelerator.free_bytes(CPU) == 0
        accelerator.release_cache(CPU)
        accelerator.synchronize(CPU)


def test_what_is_free_on_a_gpu(module: Module) -> None:
    margin = 0.02 * 24 * GIB
    assert accelerator.free_bytes(GPU) == int(12 * GIB + CONTEXT_BYTES - margin)
    module.free, module.reserved = 0, 0
    assert accelerator.free_bytes(GPU) == int(CONTEXT_BYTES - margin)
    assert accelerator.peak_bytes(GPU) == 3 * GIB + CONTEXT_BYTES


def test_bfloat16_counts_where_a_device_has_it_itself(module: Module) -> None:
    assert accelerator.has_bfloat16(GPU)
    module.emulates = True
    assert not accelerator.has_bfloat16(GPU)
    assert accelerator.has_bfloat16(CPU)


@pytest.mark.parametrize("answer", [True, False])
def test_of_heads_in_float32_that_share_keys_torch_is_asked(
    module: Module, monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    asked: list[Any] = []

    def on_cpu(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == GPU
        return torch.zeros(size, dtype=dtype)

    def able(parameters: Any) -> bool:
        asked.append(parameters)
        return answer

    monkeypatch.setattr(accelerator.torch, "empty", on_cpu)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", able)
    assert accelerator.fuses_attention(GPU, torch.float32, 8, 2, 16) is answer
    (one,) = asked
    assert (one.query.shape[1], one.key.shape[1], one.query.shape[3]) == (8, 2, 16)
    assert one.is_causal
    assert one.enable_gqa
    assert one.attn_mask is None
    for device, dtype, key_heads in (
        (CPU, torch.float32, 2), (GPU, torch.bfloat16, 2), (GPU, torch.float32, 8),
    ):  # fmt: skip
        assert accelerator.fuses_attention(device, dtype, 8, key_heads, 16)
    module.is_available = lambda: False
    assert not accelerator.fuses_attention(GPU, torch.float32, 8, 2, 16)
    assert len(asked) == 1


def test_a_device_has_a_name(module: Module) -> None:
    assert accelerator.device_name(torch.device("cuda:1")) == "Card 1"
    assert accelerator.device_name(CPU) == "cpu"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu", "unknown device 'tpu': give auto, cpu, cuda, cuda:N or xpu"),
        ("meta", "unknown device 'meta'"),
        ("mps", "the device 'mps' is not supported: give --device cpu"),
        ("cuda:2", r"there is no device 'cuda:2' here \(cuda devices: 2\)"),
    ],
)
def test_other_devices_are_refused(module: Module, name: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        accelerator.choose_device(name)


def test_a_plan_is_for_a_device_that_is_not_here(module: Module) -> None:
    module.count = 0
    assert accelerator.choose_device("cuda:3", must_be_here=False) == torch.device("cuda:3")


@pytest.mark.parametrize(
    ("taken", "counted"), [(GIB, GIB), (8 * GIB, CONTEXT_BYTES), (0, CONTEXT_BYTES)]
)
def test_the_context_is_measured_unless_others_use_the_gpu(
    module: Module, monkeypatch: pytest.MonkeyPatch, taken: int, counted: int
) -> None:
    monkeypatch.setattr(accelerator, "_context_bytes", {})
    module.free = 24 * GIB - module.reserved - taken
    accelerator._measure_context(GPU)
    assert accelerator.context_bytes(GPU) == counted


def test_copies_of_a_cpu_are_the_tensors_themselves() -> None:
    stream, tensor = CopyStream(CPU), torch.ones(3)
    (same,) = stream.to_device([tensor])
    assert same is tensor
    assert stream.to_host(tensor, accelerator.computed(tensor)) is tensor
    accelerator.take_over([tensor])
    assert not accelerator.empty_on_host([3], torch.float32, CPU).is_pinned()


VECTOR_MATH = """
import os, torch
from lowmem_gblm.runtime.accelerator import settle_vector_math
differing = 0
for _ in range(1000):
    if not (child := os.fork()):
        settle_vector_math()
        angles = torch.arange(64.0)[:, None] * torch.linspace(0, 1, 64)
        os._exit(not torch.equal(angles.cos(), angles.cos()))
    differing += os.waitpid(child, 0)[1] != 0
print(differing)
"""


@pytest.mark.slow
def test_two_threads_may_make_the_first_call_of_vector_math() -> None:
    """In a thousand processes of two threads; without it, some tens of them compute otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", VECTOR_MATH],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n"


def test_vector_math_is_settled_before_a_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle() -> None:
        raise RequestError("settled")

    monkeypatch.setattr("lowmem_gblm.model.open_model.settle_vector_math", settle)
    with pytest.raises(RequestError, match="settled"):
        open_model("nowhere", Resources())
