"""The device: its tensors, streams and events, and the module that `torch.get_device_module` finds.

Order between streams and the host is followed with vector clocks: what an operation reads must have
been written by its own stream before, by a stream that its own has waited for, or by one that the
host has waited for. Otherwise the operation is a race, and is listed in `WORLD.faults`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from support.pretend.allocator import Allocator, OutOfMemory, Piece

NAME = "pretend"
TOTAL_BYTES = 24 << 30
CONTEXT_BYTES = 512 << 20
FIRST_ADDRESS = 1 << 40
SMALL = 4096
Clock = dict[int, int]
STREAMS: list[Stream] = []


def merge(one: Clock, other: Clock) -> None:
    for stream, moment in other.items():
        one[stream] = max(one.get(stream, 0), moment)


class Stream:
    """A queue of operations of the device; copies to pinned memory arrive when it is waited for."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.id = len(STREAMS)
        STREAMS.append(self)
        self.clock: Clock = {self.id: 0}
        self.arriving: list[Callable[[], object]] = []

    def synchronize(self) -> None:
        WORLD.count_wait("stream")
        with WORLD.lock:
            WORLD.wait_for(self)

    def wait_event(self, event: Event) -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        merge(self.clock, other.clock)

    def launch(self) -> int:
        """Take note of an operation, which comes after all that the host has waited for."""
        merge(self.clock, WORLD.host)
        self.clock[self.id] += 1
        return self.clock[self.id]


class Event:
    """A moment of a stream."""

    def __init__(self, **_: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or WORLD.current).clock)

    def synchronize(self) -> None:
        WORLD.count_wait("event")
        merge(WORLD.host, self.clock)


@dataclass
class Memory:
    """What is known of the memory of one storage on the device."""

    piece: Piece
    address: int
    stream: int
    written: tuple[int, int]
    used: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    arriving: Callable[[], object] | None = None


class World:
    """The state of the device.

    Where it is `hollow`, tensors have no numbers and take no memory of this machine: shapes alone
    tell what a model of any size takes. Whatever depends on a number is answered as for a model
    without NaN, ties, or experts that see no token.
    """

    def __init__(self) -> None:
        self.hollow = False
        self.next_address = FIRST_ADDRESS
        self.lock = threading.RLock()
        self.default = Stream()
        self.streams = threading.local()
        self.host: Clock = {}
        self.allocator = Allocator()
        self.memories: dict[int, Memory] = {}
        self.watched: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.faults: list[str] = []
        self.stage = ""
        self.waits: dict[str, Counter[str]] = defaultdict(Counter)
        self.peaks: dict[str, tuple[int, int]] = {}
        self.holders: dict[int, tuple[int, str]] = {}
        self.largest: dict[str, list[tuple[int, str]]] = {}

    @property
    def current(self) -> Stream:
        return getattr(self.streams, "current", self.default)

    def wait_for(self, stream: Stream) -> None:
        merge(self.host, stream.clock)
        arriving, stream.arriving = stream.arriving, []
        for copy in arriving:
            copy()

    def wait_for_all(self) -> None:
        for stream in STREAMS:
            self.wait_for(stream)

    def count_wait(self, why: str) -> None:
        if threading.current_thread() is threading.main_thread():
            self.waits[self.stage][f"{why} {caller()}"] += 1

    def fault(self, what: str) -> None:
        if len(self.faults) < 1000:
            self.faults.append(f"{self.stage}: {what} ({caller()})")

    def of(self, tensor: Pretend) -> Memory:
        return self.memories[tensor.inner.untyped_storage()._cdata]

    def register(self, storage: Any) -> None:
        key = storage._cdata
        known = self.watched.get(key)
        if known is not None and known() is not None:
            return
        stream = self.current
        try:
            piece = self.allocator.take(storage.nbytes(), stream.id)
        except OutOfMemory as error:
            raise torch.OutOfMemoryError(f"pretend out of memory: {error}") from None
        if self.hollow:
            self.holders[key] = (piece.size, caller())
        live, reserved = self.peaks.get(self.stage, (0, 0))
        if self.allocator.live > live:
            self.largest[self.stage] = list(self.holders.values())
        self.peaks[self.stage] = (
            max(live, self.allocator.live),
            max(reserved, self.allocator.reserved),
        )
        moment = stream.launch()
        address, self.next_address = self.next_address, self.next_address + piece.size
        self.memories[key] = memory = Memory(piece, address, stream.id, (stream.id, moment))
        self.watched[key] = weakref.ref(storage, lambda _: self._freed(key, memory))

    def _freed(self, key: int, memory: Memory) -> None:
        with self.lock:
            self.holders.pop(key, None)
            if self.memories.get(key) is memory:
                del self.memories[key], self.watched[key]
            self.allocator.give_back(memory.piece)
            for stream, moment in memory.used.items():
                apart = stream != memory.stream and stream not in memory.recorded
                if apart and self.host.get(stream, 0) < moment:
                    self.fault(
                        f"memory of stream {memory.stream} is reused while {stream} reads it"
                    )

    def reads(self, tensor: Pretend, stream: Stream, moment: int) -> None:
        memory = self.of(tensor)
        writer, written = memory.written
        if stream.clock.get(writer, 0) < written:
            self.fault(f"stream {stream.id} reads what stream {writer} may not have written yet")
        elif memory.arriving is not None:
            arriving, memory.arriving = memory.arriving, None
            arriving()
        memory.used[stream.id] = moment

    def writes(self, tensor: Pretend, stream: Stream, moment: int) -> None:
        memory = self.of(tensor)
        for reader, when in memory.used.items():
            if stream.clock.get(reader, 0) < when:
                self.fault(f"stream {stream.id} overwrites what stream {reader} may still read")
        memory.used[stream.id] = moment
        memory.written = (stream.id, moment)

    def forget(self) -> None:
        """Forget what was seen of earlier runs."""
        self.faults.clear()
        self.waits.clear()
        self.peaks.clear()
        self.allocator.reset_peak()

    def report(self) -> dict[str, Any]:
        return {
            "faults": list(self.faults),
            "waits": {stage: dict(found) for stage, found in self.waits.items()},
            "peaks": dict(self.peaks),
        }


WORLD = World()
DEVICE: torch.device


def caller() -> str:
    """The innermost line of the package that led here."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/lowmem_gblm/" in path:
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class Pretend(torch.Tensor):
    """A tensor of the device: `inner` is on the CPU, and has the numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        with WORLD.lock:
            WORLD.register(inner.untyped_storage())
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({list(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return WORLD.of(self).address + self.inner.storage_offset() * self.inner.itemsize

    def untyped_storage(self) -> Any:
        memory = WORLD.of(self)
        return SimpleNamespace(data_ptr=lambda: memory.address, nbytes=lambda: memory.piece.size)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Stream) -> None:
        with WORLD.lock:
            WORLD.of(self).recorded.add(stream.id)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with WORLD.lock:
            return dispatch(func, args, dict(kwargs or {}))


# Their results depend on numbers: the host has to wait for them.
WAITING = {"aten::nonzero", "aten::masked_select", "aten::unique", "aten::_unique2"}


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if name == "aten::_local_scalar_dense":
        return to_host(args[0], "item").item()
    if name == "aten::equal":
        given = to_host(args[0], "equal"), to_host(args[1], "equal")
        return WORLD.hollow or torch.equal(*given)
    if name == "aten::copy_":
        return copy(args[0], args[1], non_blocking=bool([*args[2:], False][0]))
    device = kwargs.get("device")
    if name == "aten::_to_copy" and device is not None and torch.device(device).type == "cpu":
        if kwargs.get("non_blocking"):
            WORLD.fault("a copy to new host memory cannot run beside the computation")
        return to_host(args[0], "copy").to(kwargs.get("dtype") or args[0].dtype, copy=True)
    if device is not None and torch.device(device).type == "meta":
        return func(*mapped(inner_of, args), **mapped(inner_of, kwargs))
    given = list(tensors_in((args, kwargs)))
    if any(not isinstance(one, Pretend) and one.ndim for one in given):
        raise RuntimeError(f"tensors of {name} are on different devices: {given_on(given)}")
    return launch(func, name, args, kwargs)


def given_on(given: Sequence[torch.Tensor]) -> list[str]:
    return [f"{list(one.shape)} on {one.device}" for one in given]


def launch(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the inner tensors, on the current stream."""
    stream = WORLD.current
    moment = stream.launch()
    schema = zip(func._schema.arguments, args, strict=False)
    written = {id(value) for argument, value in schema if is_written(argument)}
    written |= {id(value) for value in kwargs.values() if isinstance(value, Pretend)}
    given = [one for one in tensors_in((args, kwargs)) if isinstance(one, Pretend)]
    views = any(one.alias_info is not None for one in func._schema.returns)
    for one in given:
        if not views or id(one) in written:
            WORLD.reads(one, stream, moment)
        if id(one) in written:
            WORLD.writes(one, stream, moment)
    if kwargs.get("device") is not None:
        kwargs["device"] = inner_device()
    kwargs.pop("pin_memory", None)
    inner_args, inner_kwargs = mapped(inner_of, args), mapped(inner_of, kwargs)
    if name in WAITING or (name == "aten::index" and has_bool(args[1])):
        WORLD.count_wait(name)
        WORLD.wait_for(stream)
    out = hollow(name, inner_args) if WORLD.hollow else NotImplemented
    if out is NotImplemented:
        out = func(*inner_args, **inner_kwargs)
    by_inner = {id(one.inner): one for one in given}
    result = mapped(lambda one: wrapped(one, by_inner), out)
    if name == "aten::any":
        result.is_any = True
    return result


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The same value with other tensors; torch's own function for this takes half of the time."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(function, one) for one in value])
    if isinstance(value, dict):
        return {key: mapped(function, one) for key, one in value.items()}
    return value


def inner_device() -> str:
    return "meta" if WORLD.hollow else "cpu"


def hollow(name: str, args: Any) -> Any:
    """The result of an operation whose shape depends on numbers, or that looks for exceptions."""
    if name == "aten::nonzero":
        return torch.empty(0, args[0].ndim, dtype=torch.int64, device="meta")
    if name == "aten::index_put_" and has_bool(args[1]):
        return args[0]
    return NotImplemented


def is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def has_bool(indices: Any) -> bool:
    return any(one is not None and one.dtype == torch.bool for one in indices)


def inner_of(one: Any) -> Any:
    return one.inner if isinstance(one, Pretend) else one


def wrapped(one: torch.Tensor, by_inner: dict[int, Pretend]) -> Pretend:
    return by_inner[id(one)] if id(one) in by_inner else Pretend(one)


def to_host(tensor: torch.Tensor, why: str) -> torch.Tensor:
    """The numbers of a tensor, after the host has waited for them."""
    if not isinstance(tensor, Pretend):
        return tensor
    stream = WORLD.current
    WORLD.reads(tensor, stream, stream.launch())
    WORLD.count_wait(why)
    WORLD.wait_for(stream)
    if not WORLD.hollow:
        return tensor.inner
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return made.fill_(usual_value(tensor)) if made.numel() < SMALL else made


def usual_value(tensor: Pretend) -> float:
    """The number of a hollow tensor: flags say that all is well, counts that nothing is found."""
    if tensor.dtype == torch.bool:
        return not getattr(tensor, "is_any", False)
    return 0.5 if tensor.is_floating_point() else 0


def copy(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
    """Copy between two places; beside the computation only from and to pinned memory."""
    if isinstance(target, Pretend) and isinstance(source, Pretend):
        return launch(torch.ops.aten.copy_.default, "aten::copy_", (target, source), {})
    host = source if isinstance(target, Pretend) else target
    if non_blocking and not is_pinned(host) and host.numel() > 1:
        WORLD.fault("a copy from or to pageable memory cannot run beside the computation")
        non_blocking = False
    stream = WORLD.current
    moment = stream.launch()
    if isinstance(target, Pretend):
        WORLD.writes(target, stream, moment)
        inner = target.inner
        if not non_blocking:
            if host.numel() > 1:
                WORLD.count_wait("copy to the device")
            move(inner, source)
            return target
        spoil(inner)
        WORLD.of(target).arriving = lambda: move(inner, source)
        stream.arriving.append(lambda: arrive(target))
        return target
    assert isinstance(source, Pretend)
    WORLD.reads(source, stream, moment)
    if not non_blocking:
        WORLD.count_wait("copy to the host")
        WORLD.wait_for(stream)
        return move(target, source.inner)
    values = source.inner.clone()
    spoil(target)
    stream.arriving.append(lambda: move(target, values))
    return target


def move(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return target if WORLD.hollow else target.copy_(source)


def arrive(target: Pretend) -> None:
    memory = WORLD.of(target)
    if memory.arriving is not None:
        arriving, memory.arriving = memory.arriving, None
        arriving()


def spoil(tensor: torch.Tensor) -> None:
    """What is there before a copy has arrived."""
    if WORLD.hollow:
        return
    tensor.fill_(torch.nan if tensor.is_floating_point() else 1)


def is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in WORLD.pinned


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory for copies; pinned where the device is the pretended one."""
    made = torch.empty(tuple(shape), dtype=dtype)
    storage = made.untyped_storage()
    if device.type == NAME and storage.nbytes():
        place = storage.data_ptr()
        WORLD.pinned[place] = weakref.ref(storage, lambda _: WORLD.pinned.pop(place, None))
    return made


class Module:
    """What `torch.cuda` is for CUDA."""

    Stream = Stream
    Event = Event
    total = TOTAL_BYTES

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """There are no random numbers on the device."""

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def init(self) -> None:
        """Nothing to start."""

    def set_device(self, device: Any) -> None:
        """There is one device."""

    def get_device_name(self, device: Any = None) -> str:
        return "a pretended accelerator"

    def get_device_properties(self, device: Any = None) -> Any:
        return SimpleNamespace(total_memory=self.total)

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        context = CONTEXT_BYTES
        return self.total - context - WORLD.allocator.reserved, self.total

    def memory_reserved(self, device: Any = None) -> int:
        return WORLD.allocator.reserved

    def max_memory_reserved(self, device: Any = None) -> int:
        return WORLD.allocator.peak_reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        WORLD.allocator.reset_peak()

    def empty_cache(self) -> None:
        with WORLD.lock:
            WORLD.allocator.empty_cache()

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        return 1.0

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        WORLD.allocator.limit = None if fraction >= 1 else int(fraction * self.total)

    def synchronize(self, device: Any = None) -> None:
        WORLD.count_wait("device")
        with WORLD.lock:
            WORLD.wait_for_all()

    def current_stream(self, device: Any = None) -> Stream:
        return WORLD.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        former, WORLD.streams.current = WORLD.current, stream
        try:
            yield
        finally:
            WORLD.streams.current = former


class Attention(torch.autograd.Function):
    """Attention as one kernel, with the numbers of the CPU's."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
        ctx.options = options
        ctx.save_for_backward(query, key, value, mask)
        inner = [inner_of(one) for one in (query, key, value, mask)]
        with torch.no_grad(), WORLD.lock:
            note_reads([query, key, value, mask])
            if WORLD.hollow:
                batch, heads, length, _ = query.shape
                Pretend(inner[0].new_empty((batch, heads, length), dtype=torch.float32))
                return Pretend(inner[0].new_empty((*query.shape[:-1], value.shape[-1])))
            return Pretend(ORIGINAL["attention"](*inner, **options))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = ctx.saved_tensors
        with WORLD.lock:
            note_reads([*saved, *gradients])
            inner = [None if one is None else one.inner.detach() for one in saved]
            if WORLD.hollow:
                accumulated = Pretend(torch.empty_like(inner[0], dtype=torch.float32))
                found = [Pretend(torch.empty_like(one)) for one in inner[:3]]
                del accumulated
                return (*found, None, None)
            leaves = [one.requires_grad_() for one in inner[:3]]
            with torch.enable_grad():
                out = ORIGINAL["attention"](*leaves, inner[3], **ctx.options)
            found = torch.autograd.grad(out, leaves, gradients[0].inner)
            return (*map(Pretend, found), None, None)


class Silu(torch.autograd.Function):
    """The operation, whose backward torch takes apart for tensors that are not its own."""

    @staticmethod
    def forward(ctx: Any, input: Any) -> Any:
        ctx.save_for_backward(input)
        with WORLD.lock:
            note_reads([input])
            return Pretend(torch.ops.aten.silu(input.inner))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (input,) = ctx.saved_tensors
        with WORLD.lock:
            note_reads([input, gradients[0]])
            return Pretend(torch.ops.aten.silu_backward(gradients[0].inner, input.inner))


def note_reads(given: Sequence[Any]) -> None:
    stream = WORLD.current
    moment = stream.launch()
    for one in given:
        if one is not None:
            WORLD.reads(one, stream, moment)


ORIGINAL: dict[str, Callable[..., Any]] = {}
_LIBRARY: list[Any] = []


def install() -> None:
    """Make the device known to torch and to the package, for the rest of the process."""
    global DEVICE
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    DEVICE = torch.device(NAME, 0)
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", _empty)
    library.impl("empty_strided", _empty_strided)
    library.impl("_copy_from", _copy_from)
    _LIBRARY.append(library)
    functional = torch.nn.functional
    ORIGINAL["attention"] = functional.scaled_dot_product_attention
    ORIGINAL["silu"] = functional.silu
    functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    functional.silu = _silu
    from lowmem_gblm.runtime import accelerator

    ORIGINAL["empty_on_host"] = accelerator.empty_on_host
    accelerator.empty_on_host = empty_on_host
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def _empty(size: Any, dtype: Any = None, **_: Any) -> Pretend:
    return Pretend(torch.empty(size, dtype=dtype, device=inner_device()))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Pretend:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype, device=inner_device()))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """Copy where torch leaves the dispatch to Python out, as `torch.tensor(…, device=…)` does."""
    with WORLD.lock:
        return copy(target, source, non_blocking=non_blocking)


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if isinstance(query, Pretend):
        if attn_mask is not None and not isinstance(attn_mask, Pretend):
            raise RuntimeError("the mask of attention is on another device")
        return Attention.apply(query, key, value, attn_mask, options)
    return ORIGINAL["attention"](query, key, value, attn_mask, dropout_p, **options)


def _silu(input: Any, inplace: bool = False) -> Any:
    if isinstance(input, Pretend) and not inplace:
        return Silu.apply(input)
    return ORIGINAL["silu"](input, inplace)
