"""Devices: the only file that names a type of device.

CUDA, ROCm (which torch calls CUDA) and Intel XPU have torch modules with the same functions, which
`torch.get_device_module` finds. Nothing here does anything for the CPU, so that callers need not
ask which device they have.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lowmem_gblm.errors import BudgetError, RequestError

CPU = torch.device("cpu")

_CUDA = "cuda"
_TYPES = (_CUDA, "xpu")
# Apple's GPUs share the memory of the host and have no streams: no plan here is right for them.
_REFUSED = ("mps",)
# What drivers and kernels take of a GPU beside torch's allocator, where it cannot be measured.
CONTEXT_BYTES = 512 << 20
_LARGEST_CONTEXT_BYTES = 1536 << 20
_MARGIN = 0.02
# Which kernel attention has does not depend on how many tokens there are, if more than one.
_SOME_TOKENS = 64
# Read by CUDA when it starts: without it, products are not the same bits twice.
_REPRODUCIBLE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_context_bytes: dict[torch.device, int] = {}

# Older versions of torch raise a plain RuntimeError.
_ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
# Drivers of accelerators begin so the messages that torch raises as a plain RuntimeError.
_DEVICE_ERROR = re.compile(
    r"(CUDA|HIP|XPU|MPS|NCCL|cu(BLAS|DNN|SOLVER|SPARSE|RAND)|roc(BLAS|SOLVER)|MIOpen|Triton)\b.*"
    r"(error|failed|failure|out of memory|STATUS)",
    re.IGNORECASE | re.DOTALL,
)


def is_accelerator(device: torch.device) -> bool:
    """Return whether a device has memory of its own, which tensors are copied to."""
    return device.type not in ("cpu", "meta")


def settle_vector_math() -> None:
    """Have the CPU's vector math choose its code, in one thread, before several threads use it.

    Where two threads make the first call of a process, MKL may compute a part of it with an error
    of 1e-4: cosines of positions differed between two samples in 4 % of processes.
    """
    torch.ones(1).cos()


def choose_device(name: str, *, must_be_here: bool = True) -> torch.device:
    """Return the device meant by "auto", "cpu", "cuda" or "cuda:1"; if it must be here, ready.

    Raises:
        RequestError: No such device is known, supported, or here.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    usable = None if here is None or here.type in _REFUSED else here.type
    if name == "auto":
        name = usable or CPU.type
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type in _REFUSED:
        raise RequestError(f"the device {name!r} is not supported: give --device cpu")
    if device.type not in (CPU.type, *_TYPES, usable):
        raise RequestError(f"unknown device {name!r}: give auto, cpu, cuda, cuda:N or xpu")
    if not is_accelerator(device):
        return device
    count = torch.get_device_module(device).device_count()
    if (device.index or 0) >= count:
        if not must_be_here:
            return device
        raise RequestError(f"there is no device {name!r} here ({device.type} devices: {count})")
    return _ready(device)


def is_device_error(error: BaseException) -> bool:
    """Return whether `error` comes from a GPU or its driver, out of memory included."""
    if isinstance(error, (torch.OutOfMemoryError, _ACCELERATOR_ERROR)):
        return True
    return isinstance(error, RuntimeError) and bool(_DEVICE_ERROR.search(str(error)))


def is_here(device: torch.device) -> bool:
    """Return whether this machine can compute on a device."""
    return not is_accelerator(device) or bool(torch.get_device_module(device).is_available())


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 itself; one that is not here is taken to."""
    if not is_accelerator(device) or not is_here(device):
        return True
    module = torch.get_device_module(device)
    return bool(module.is_bf16_supported(including_emulation=False))


def fuses_attention(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_width: int
) -> bool:
    """Return whether attention without a mask is one kernel, which holds no [heads, T, T].

    So it is on a CPU, in half precision, and where every head has keys of its own. Whether float32
    heads that share keys have such a kernel depends on the GPU and on torch, which is asked; a GPU
    that is not here is taken to have none.
    """
    if not is_accelerator(device) or dtype.itemsize < torch.float32.itemsize or heads == key_heads:
        return True
    if device.type != _CUDA or not is_here(device):
        return False
    query, key = (
        torch.empty(1, count, _SOME_TOKENS, head_width, dtype=dtype, device=device)
        for count in (heads, key_heads)
    )
    asked = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, True)
    return torch.backends.cuda.can_use_efficient_attention(asked)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    if not is_accelerator(device):
        return device.type
    return str(torch.get_device_module(device).get_device_name(device))


def _ready(device: torch.device) -> torch.device:
    """Return a GPU by number, current and in use: the host memory it takes is counted then."""
    os.environ.setdefault(*_REPRODUCIBLE)
    module = torch.get_device_module(device)
    module.init()
    device = torch.device(device.type, device.index or 0)
    module.set_device(device)
    square = torch.ones(64, 64, device=device)
    torch.mm(square, square)
    module.synchronize(device)
    _measure_context(device)
    return device


def _measure_context(device: torch.device) -> None:
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    taken = total - free - module.memory_reserved(device)
    # More than any context takes is held by other processes, and cannot be told from it.
    _context_bytes[device] = taken if 0 < taken <= _LARGEST_CONTEXT_BYTES else CONTEXT_BYTES


def context_bytes(device: torch.device) -> int:
    """Return what drivers and kernels take of a GPU, measured where that is possible."""
    return _context_bytes.get(device, CONTEXT_BYTES) if is_accelerator(device) else 0


def free_bytes(device: torch.device) -> int:
    """Return the GPU memory that this process can grow to, its context included; 0 for a CPU.

    The margin of 2 % is for other processes on the GPU, and for kernels, which are loaded when they
    are first used.
    """
    if not is_accelerator(device):
        return 0
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    own = module.memory_reserved(device) + context_bytes(device)
    return int(max(0, min(total, free + own) - _MARGIN * total))


def peak_bytes(device: torch.device) -> int:
    """Return the peak of a GPU's memory in this run, its context included; 0 for a CPU."""
    if not is_accelerator(device):
        return 0
    module = torch.get_device_module(device)
    return int(module.max_memory_reserved(device)) + context_bytes(device)


def release_cache(device: torch.device) -> None:
    """Give memory that torch keeps for reuse back to a GPU, for the streams of the next pass."""
    if is_accelerator(device):
        torch.get_device_module(device).empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if is_accelerator(device):
        torch.get_device_module(device).synchronize(device)


@contextmanager
def run_on(device: torch.device, limit_bytes: int | None = None) -> Iterator[None]:
    """Run the body with exact products and limited memory; put all settings back afterwards.

    Beyond the limit, which covers tensors, what torch keeps for reuse and the context, torch raises
    its out-of-memory error, even if the GPU has more. float32 products are float32, and sums of
    half-precision products are float32, whatever the environment asks for.

    Raises:
        BudgetError: The context alone takes as much as the limit.
    """
    if not is_accelerator(device):
        yield
        return
    module = torch.get_device_module(device)
    with ExitStack() as restored:
        if limit_bytes is not None:
            former = module.get_per_process_memory_fraction(device)
            module.set_per_process_memory_fraction(_share(device, limit_bytes), device)
            restored.callback(module.set_per_process_memory_fraction, former, device)
        restored.enter_context(_exact_products())
        module.empty_cache()
        module.reset_peak_memory_stats(device)
        restored.callback(module.empty_cache)
        yield


def _share(device: torch.device, limit_bytes: int) -> float:
    context = context_bytes(device)
    if limit_bytes <= context:
        raise BudgetError(
            f"{limit_bytes / 2**30:.2f} GiB of GPU memory may be used, and the driver itself takes "
            f"about {context / 2**30:.2f} GiB. Give a larger --gpu-memory, or --device cpu"
        )
    total: int
    _, total = torch.get_device_module(device).mem_get_info(device)
    return min(1.0, (limit_bytes - context) / total)


@contextmanager
def _exact_products() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    names = (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    former = {name: getattr(matmul, name) for name in names}
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in former.items():
            setattr(matmul, name, value)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Run the body with kernels of a GPU that give the same bits twice.

    Raises:
        RuntimeError: torch has no such kernel for an operation.
    """
    if not is_accelerator(device):
        yield
        return
    settings: Any = torch.utils.deterministic
    former = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(former[0])
        settings.fill_uninitialized_memory = former[1]


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return host memory that copies to and from the device run fast with, and beside the rest."""
    return torch.empty(shape, dtype=dtype, pin_memory=is_accelerator(device))


def computed(tensor: Tensor) -> Any:
    """Return the event at which a GPU has computed a tensor; None on a CPU."""
    if not is_accelerator(tensor.device):
        return None
    event = torch.get_device_module(tensor.device).Event()
    event.record(current_stream(tensor.device))
    return event


def take_over(tensors: Sequence[Tensor]) -> None:
    """Let the current stream use copies that `CopyStream.to_device` has made."""
    for tensor in tensors:
        if is_accelerator(tensor.device):
            # The stream that copied owns the memory: no reuse before this stream is done.
            tensor.record_stream(current_stream(tensor.device))


def current_stream(device: torch.device) -> Any:
    """Return the stream that this thread gives work to."""
    return torch.get_device_module(device).current_stream(device)


class CopyStream:
    """Copies between host and device beside the computation; on a CPU nothing is copied.

    Its methods wait for their copies, in one thread at a time that is not the computing one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None
        if is_accelerator(device):
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of tensors of `empty_on_host`; who computes with them calls `take_over`."""
        if self._stream is None:
            return list(tensors)
        self._module.set_device(self._device)
        with self._module.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        self._stream.synchronize()
        return copies

    def to_host(self, tensor: Tensor, ready: Any) -> Tensor:
        """Return a copy of a tensor in host memory; `ready` is what `computed` has returned."""
        if self._stream is None or not is_accelerator(tensor.device):
            return tensor
        self._module.set_device(self._device)
        self._stream.wait_event(ready)
        copy = empty_on_host(tensor.shape, tensor.dtype, self._device)
        with self._module.stream(self._stream):
            copy.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return copy
