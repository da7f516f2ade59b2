"""What CUDA IPC does for memory of the stand-in: another process maps the same bytes, and writes to them."""

import os
from typing import Any

import torch

from memserve.transfer.shared_memory import SharedHandle, handle_of
from stand_in.gpu import StandInGpu
from stand_in.tensors import SPECIAL, OnGpu


class SharedStorage:
    """The storage of a tensor whose bytes another process can map; of any other, its size alone."""

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def nbytes(self) -> int:
        return self.inner.untyped_storage().nbytes()

    def _share_cuda_(self) -> tuple[Any, ...]:
        whole = torch.empty(0, dtype=torch.uint8).set_(self.inner.untyped_storage())
        handle = handle_of(whole)
        assert handle is not None, "memory of its own, not a view"
        return 0, f"{handle.pid} {handle.fd}".encode(), handle.num_bytes, 0, b"counter", 0, b"", False


def install(gpu: StandInGpu) -> None:
    def opened(index: int, segment: bytes, num_bytes: int, *_: Any) -> SharedStorage:
        pid, fd = map(int, segment.split())
        assert pid != os.getpid(), "CUDA opens no memory of the same process"
        try:
            return SharedStorage(SharedHandle(pid, fd, num_bytes).attach())
        except OSError as error:
            raise RuntimeError(f"CUDA error: invalid resource handle ({error})") from error

    torch.UntypedStorage._new_shared_cuda = staticmethod(opened)
    torch.UntypedStorage._release_ipc_counter_cuda = staticmethod(lambda *_: None)
    SPECIAL[torch.Tensor.untyped_storage] = lambda tensor: SharedStorage(tensor.inner)
    torch.Tensor.set_ = _set(torch.Tensor.set_)


def _set(set_: Any) -> Any:
    def replaced(tensor: torch.Tensor, source: Any, *args: Any) -> torch.Tensor:
        if isinstance(source, SharedStorage):
            assert isinstance(tensor, OnGpu), "memory of a GPU"
            return tensor.gpu.tensor(source.inner.view(tensor.dtype))
        return set_(tensor, source, *args)

    return replaced
