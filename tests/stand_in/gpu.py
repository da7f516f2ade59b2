"""StandInGpu: runs what is asked of its tensors, and keeps the rules of a GPU."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from memserve.jit import KernelLaunch
from memserve.transfer.shared_memory import SharedMemory
from stand_in.operations import WAITS, aten, is_view, writes
from stand_in.tensors import OnGpu, inner_of, is_cuda

_SHAREABLE_BYTES = 1 << 12  # smaller ones are nobody's cache


@dataclass(frozen=True)
class UnderWay:
    """An asynchronous copy to the GPU that nobody has waited for."""

    host: torch.Tensor
    sent: torch.Tensor


class StandInGpu:
    """Runs operations, and remembers what would be under way.

    recorded: what a graph that is being captured has so far, or None.  num_waits: how often somebody waited.
    sync_debug: as torch.cuda.set_sync_debug_mode.
    """

    def __init__(self) -> None:
        self.recorded: list[Callable[[], object]] | None = None
        self.num_waits = 0
        self.sync_debug = "default"
        self._under_way: list[UnderWay] = []
        self._of_thread = threading.local()
        self._pinned: dict[int, torch.Tensor] = {}  # by address; kept, as the allocator of such memory keeps it

    @property
    def side_stream(self) -> Any:
        """Of this thread; None: it is on the stream of what computes."""
        return getattr(self._of_thread, "side_stream", None)

    @side_stream.setter
    def side_stream(self, stream: Any) -> None:
        self._of_thread.side_stream = stream

    def tensor(self, inner: torch.Tensor) -> OnGpu:
        return OnGpu(inner, self)

    def made(self, make: Callable[[], torch.Tensor], *, unwritten: bool) -> OnGpu:
        """A new tensor. unwritten: its memory holds what was there before."""
        made = self.shareable(make())
        if unwritten:
            poison(made.inner)
        elif self.recorded is not None:
            self.recorded.append(lambda: made.inner.copy_(make()))
        return made

    def shareable(self, host: torch.Tensor) -> OnGpu:
        """A copy in memory of its own, which another process can map while this tensor lives."""
        if host.nbytes < _SHAREABLE_BYTES:
            return self.tensor(host)
        memory = SharedMemory(host.nbytes)
        made = self.tensor(memory.bytes.view(host.dtype).view(host.shape))
        made.inner.copy_(host)
        made.memory = memory
        return made

    def wait(self, what: str, *, counted: bool = True) -> None:
        """The host waits for the GPU: copies under way end, with what their memory held when they were asked for."""
        if self.recorded is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        if counted:
            self.num_waits += 1
            if self.sync_debug == "error":
                raise RuntimeError(f"{what}: called a synchronizing CUDA operation")
            if self.sync_debug == "warn":
                warnings.warn(f"{what}: called a synchronizing CUDA operation", stacklevel=2)
        under_way, self._under_way = self._under_way, []
        for copy in under_way:
            if not same_bytes(copy.host, copy.sent):
                raise RuntimeError(f"host memory {tuple(copy.host.shape)} changed while it was copied to the GPU")

    def pin(self, host: torch.Tensor) -> torch.Tensor:
        self._pinned[host.untyped_storage().data_ptr()] = host
        return host

    def received(self, host: torch.Tensor, *, non_blocking: bool, dtype: torch.dtype | None = None) -> OnGpu:
        """A copy of the host's tensor."""
        arrived = self.shareable(host.to(dtype or host.dtype, copy=True))
        self._copied_in(host, non_blocking)
        return arrived

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation with a tensor of the GPU among its arguments."""
        if not is_view(func):
            self._check_stream(str(func))
        if isinstance(func, torch._ops.OpOverload):  # in inference mode those come that are made of others
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        if func is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        if func is aten.copy_.default:
            return self.copy(*args, **kwargs)
        if func in WAITS:
            self.wait(str(func))
        return self._on_gpu(func, args, kwargs)

    def _on_gpu(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._check_devices(func, args, kwargs)
        goes_to_host = kwargs.get("device") is not None and not is_cuda(kwargs["device"])
        kwargs = kwargs if kwargs.get("device") is None else {**kwargs, "device": torch.device("cpu")}
        known = {id(x.inner): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnGpu)}
        inner_args, inner_kwargs = tree_map(inner_of, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if goes_to_host:
            return out
        if "empty" in func.name():
            poison(out)
        else:
            self._record(func, inner_args, inner_kwargs, out)

        def wrapped(x: Any) -> Any:
            return (known[id(x)] if id(x) in known else self.tensor(x)) if isinstance(x, torch.Tensor) else x

        return tree_map(wrapped, out)

    def launch(self, launch: KernelLaunch, run: Callable[[KernelLaunch], None]) -> None:
        """A kernel over memory of the GPU alone."""
        self._check_stream(launch.kernel.fn.__name__)
        host = [name for name, x in launch.args.items() if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu)]
        if host:
            raise RuntimeError(f"kernel arguments {host} are in the host's memory")
        inside = replace(launch, args={name: inner_of(x) for name, x in launch.args.items()})
        run(inside)
        if self.recorded is not None:
            self.recorded.append(lambda: run(inside))

    def _check_stream(self, what: str) -> None:
        """Copies beside compute are for streams beside it: on its own they would wait for all that it was given."""
        thread = threading.current_thread()
        if self.side_stream is None and thread is not threading.main_thread():
            raise RuntimeError(f"{what} by the thread {thread.name!r}, on the stream of what computes")

    def _check_devices(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        host = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() > 0]
        if host:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")

    def _to_copy(self, tensor: torch.Tensor, *, device=None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is None or is_cuda(device):
            kept = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format")}
            return self._on_gpu(aten._to_copy.default, (tensor,), kept)
        self.wait("copy to the host")
        return tensor.inner.to(kwargs.get("dtype") or tensor.dtype, copy=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        inner_of(target).copy_(inner_of(source))
        if not isinstance(target, OnGpu):
            self.wait("copy to the host")
        elif not isinstance(source, OnGpu) and source.dim() > 0:
            self._copied_in(source, non_blocking)
        else:
            self._record(aten.copy_.default, (target.inner, inner_of(source)), {}, target.inner)
        return target

    def _copied_in(self, host: torch.Tensor, non_blocking: bool) -> None:
        if self.recorded is not None:
            raise RuntimeError("a copy from the host: a captured graph would read that memory again and again")
        if non_blocking and host.untyped_storage().data_ptr() in self._pinned:
            self._under_way.append(UnderWay(host, host.clone()))
        else:
            self.wait("copy from pageable memory")

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self.recorded is None:
            return
        if writes(func):
            self.recorded.append(lambda: func(*args, **kwargs))
        elif not is_view(func):
            outs = tree_flatten(out)[0]

            def again() -> None:
                for old, new in zip(outs, tree_flatten(func(*args, **kwargs))[0], strict=True):
                    old.copy_(new)

            self.recorded.append(again)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.numel():
        return True
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def poison(memory: torch.Tensor) -> None:
    """What a new tensor holds that nothing was written to."""
    if memory.is_floating_point():
        memory.fill_(torch.nan)
    elif memory.dtype != torch.bool:
        memory.fill_(0x55)
