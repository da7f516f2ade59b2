"""OnGpu: a tensor of the stand-in. What is asked of one goes to its StandInGpu (gpu.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from stand_in.operations import ASSIGNED, INDEXED, aten

DEVICE = torch.device("cuda", 0)
_NO_GPU = ("not linked with support for cuda", "CUDA driver version is insufficient")  # torch without CUDA, and with it
_OTHER_NAMES = {"invert": "bitwise_not"}


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class OnGpu(torch.Tensor):
    """inner: where the bytes are.  gpu: the StandInGpu."""

    inner: torch.Tensor
    gpu: Any

    @staticmethod
    def __new__(cls, inner: torch.Tensor, gpu: Any) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner, made.gpu = inner, gpu
        return made

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        special = SPECIAL.get(func)
        if special is not None:
            return special(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return func(*args, **(kwargs or {}))
            except RuntimeError as error:  # of a binding that asks for the device before it dispatches
                if not any(said in str(error) for said in _NO_GPU):
                    raise
                name = func.__name__.strip("_")
                return getattr(aten, _OTHER_NAMES.get(name, name))(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        gpu = next(x.gpu for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnGpu))
        return gpu.run(func, args, kwargs or {})


def _new_tensor(like: OnGpu, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> OnGpu:
    return like.gpu.received(torch.tensor(data, dtype=dtype or like.dtype), non_blocking=False)


def _on_gpu_index(tensor: OnGpu, index: Any) -> Any:
    """Lists and the host's tensors among the indices go to the GPU first, and whoever indexes waits for it."""

    def placed(part: Any) -> Any:
        is_host = isinstance(part, torch.Tensor) and not isinstance(part, OnGpu) and part.dim() > 0
        if not is_host and not isinstance(part, list):
            return part
        return tensor.gpu.received(torch.as_tensor(part), non_blocking=False)

    return tuple(map(placed, index)) if isinstance(index, tuple) else placed(index)


def _getitem(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    index = _on_gpu_index(tensor, index)
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, OnGpu)]
    if any(part.dtype == torch.bool for part in parts):
        tensor.gpu.wait("a mask as an index")  # how many are taken, the host has to know
    if parts:
        return tensor.gpu.run(INDEXED, (tensor, index), {})
    return tensor.gpu.tensor(tensor.inner[index])


def _setitem(tensor: torch.Tensor, index: Any, value: Any) -> None:
    tensor.gpu.run(ASSIGNED, (tensor, _on_gpu_index(tensor, index), value), {})


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    gpu = target.gpu if isinstance(target, OnGpu) else source.gpu
    return gpu.copy(target, source, non_blocking)


def _read_by(name: str) -> Callable[[OnGpu], Any]:
    return lambda tensor: getattr(tensor.cpu(), name)()


def _numpy(tensor: OnGpu, **_: Any) -> None:
    raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")


SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.data_ptr: lambda tensor: tensor.inner.data_ptr(),
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.__setitem__: _setitem,
    torch.Tensor.numpy: _numpy,
    **{getattr(torch.Tensor, name): _read_by(name) for name in ("tolist", "item", "__float__", "__int__", "__bool__")},
    torch.Tensor.copy_: _copied,
}


def inner_of(x: Any) -> Any:
    return x.inner if isinstance(x, OnGpu) else x
