"""As much of torch.cuda as memserve, its scripts and its tests call, over a StandInGpu; and who makes tensors on it."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from memserve.jit import KernelLaunch
from stand_in.gpu import StandInGpu
from stand_in.tensors import DEVICE, OnGpu, is_cuda

CAPABILITY = (9, 0)
NUM_MULTIPROCESSORS = 1  # few programs: the interpreter runs them in turn
NUM_BYTES = 1 << 30
FACTORIES = ("empty", "zeros", "ones", "full", "arange", "tensor", "randn", "rand", "randint", "randperm")
UUID = "00000000-0000-0000-0000-000000000000"


def install(gpu: StandInGpu) -> None:
    """For the whole process, for good."""
    for name in FACTORIES:
        setattr(torch, name, _factory(gpu, name, getattr(torch, name)))
    torch.Tensor.to = _to(gpu, torch.Tensor.to)
    torch.Tensor.cuda = lambda tensor, device=None, non_blocking=False: tensor.to(DEVICE, non_blocking=non_blocking)
    torch.Tensor.pin_memory = lambda tensor, *_: gpu.pin(tensor.clone())
    run = KernelLaunch.run
    KernelLaunch.run = lambda launch: gpu.launch(launch, run)
    for name, value in _cuda_api(gpu).items():
        setattr(torch.cuda, name, value)


def _factory(gpu: StandInGpu, name: str, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if not is_cuda(device):
            host = make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
            return gpu.pin(host) if pin_memory else host
        if name == "tensor":
            return gpu.received(make(*args, **kwargs), non_blocking=False)
        return gpu.made(lambda: make(*args, **kwargs), unwritten=name == "empty")

    return made


def _to(gpu: StandInGpu, to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def moved(tensor: torch.Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        first = args[0] if args else kwargs.get("device")
        device = first.device if isinstance(first, torch.Tensor) else first
        if isinstance(device, torch.dtype) or not is_cuda(device):
            return to(tensor, *args, non_blocking=non_blocking, **kwargs)
        dtype = kwargs.get("dtype") or next((x for x in args[1:] if isinstance(x, torch.dtype)), None)
        dtype = first.dtype if isinstance(first, torch.Tensor) else dtype
        if isinstance(tensor, OnGpu):
            return to(tensor, dtype) if dtype is not None else tensor
        return gpu.received(tensor, non_blocking=non_blocking, dtype=dtype)

    return moved


class _Stream:
    """Everything runs at once, whatever its stream."""

    def __init__(self, gpu: StandInGpu, device: Any = None) -> None:
        self._gpu = gpu

    def synchronize(self) -> None:
        self._gpu.wait("stream.synchronize()")

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event(self._gpu)
        event.record(self)
        return event

    def wait_stream(self, stream: "_Stream") -> None:
        """All that was launched has ended."""

    def wait_event(self, event: Any) -> None:
        """All that was launched has ended."""


class _Event:
    def __init__(self, gpu: StandInGpu, enable_timing: bool = False) -> None:
        self._gpu, self._at_s = gpu, 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        self._gpu.wait("event.synchronize()")

    def elapsed_time(self, end: "_Event") -> float:
        return (end._at_s - self._at_s) * 1e3


class _Graph:
    """What was launched while it was captured, launched again."""

    def __init__(self, gpu: StandInGpu) -> None:
        self._gpu = gpu
        self._steps: list[Callable[[], object]] = []

    @contextmanager
    def captured(self) -> Any:
        assert self._gpu.recorded is None, "one graph at a time"
        self._gpu.recorded = self._steps
        try:
            yield
        finally:
            self._gpu.recorded = None

    @torch.inference_mode()
    def replay(self) -> None:
        for step in self._steps:
            step()


def _bound(kind: type, gpu: StandInGpu) -> type:
    """The class that torch.cuda has: made without naming the GPU, and good for annotations."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, gpu, *args, **kwargs)

    return type(kind.__name__.strip("_"), (kind,), {"__init__": init})


@contextmanager
def _within(*_: Any) -> Any:
    yield


class _Streams:
    """Each thread's current stream; none has another than what computes until it enters one."""

    def __init__(self, gpu: StandInGpu) -> None:
        self._gpu, self._default = gpu, _Stream(gpu)

    def current(self, device: Any = None) -> _Stream:
        return self._gpu.side_stream or self._default

    @contextmanager
    def entered(self, stream: _Stream | None) -> Any:
        before, self._gpu.side_stream = self._gpu.side_stream, stream
        try:
            yield
        finally:
            self._gpu.side_stream = before


def _cuda_api(gpu: StandInGpu) -> dict[str, Any]:
    streams = _Streams(gpu)
    properties = SimpleNamespace(
        name="stand-in", multi_processor_count=NUM_MULTIPROCESSORS, uuid=UUID, shared_memory_per_block_optin=227 << 10,
        total_memory=NUM_BYTES,
    )  # fmt: skip

    def set_sync_debug_mode(mode: str) -> None:
        gpu.sync_debug = mode

    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _within,
        "stream": streams.entered,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: "stand-in",
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (NUM_BYTES, NUM_BYTES),
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize()", counted=False),
        "empty_cache": lambda: None,
        "current_stream": streams.current,
        "Stream": _bound(_Stream, gpu),
        "Event": _bound(_Event, gpu),
        "CUDAGraph": _bound(_Graph, gpu),
        "graph": lambda graph, pool=None, stream=None, capture_error_mode="global": graph.captured(),
        "graph_pool_handle": lambda: object(),
        "set_sync_debug_mode": set_sync_debug_mode,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, num_bytes, flags: 0, cudaHostUnregister=lambda address: 0
        ),
        "check_error": lambda status: None,
    }
