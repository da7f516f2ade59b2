"""Device: the GPU that a process's KV lies on, or none: how its memory is named to other processes, and copied beside
compute. Knows no move.

    share -> DeviceHandle, in the directory -> open, in another process: the same bytes, as memory of that one's own GPU

CUDA IPC, by torch's storages. Since a peer's memory is opened for the own GPU wherever it lies, one kernel there reads
the source and writes the peer's blocks, through NVLink or PCIe if they lie on another GPU. torch would free shared
memory by a count that knows one receiver; here its owner keeps it until nobody maps it (`Directory.visitors`).
"""

from abc import ABC, abstractmethod

import msgspec
import numpy as np
import torch

from memserve.transfer.block_copy import copy_rows
from memserve.transfer.side_stream import Beside, NoStream, SideStream

_WARM_UP_BYTES = 128  # a row of 16 words, as most rows are of a multiple of as many


class DeviceHandle(msgspec.Struct, frozen=True):
    """Names memory of a GPU to other processes of its host.

    gpu: its UUID, since numbers differ between processes.  segment, start_bytes: what CUDA allocated, and where the
    memory begins in it.  counter, counter_index: where torch counts the receivers.
    """

    gpu: str
    segment: bytes
    start_bytes: int
    num_bytes: int
    counter: bytes
    counter_index: int


class Device(ABC):
    """piece_bytes: how much is copied at once at most; whoever detaches an endpoint waits for as much.

    side: what orders copies of its memory behind what had been computed when they were asked for.
    """

    piece_bytes: int
    side: Beside

    @abstractmethod
    def holds(self, memory: torch.Tensor) -> bool:
        """Whether a memory is this device's."""

    @abstractmethod
    def share(self, memory: torch.Tensor) -> DeviceHandle:
        """Names a memory, all of its storage. Raises ValueError for a part of one."""

    @abstractmethod
    def check(self, handle: DeviceHandle) -> None:
        """Raises ValueError for a peer's memory that this device cannot write to."""

    @abstractmethod
    def open(self, handle: DeviceHandle) -> torch.Tensor:
        """A peer's memory, uint8 [num_bytes]; mapped while the tensor lives. Raises RuntimeError."""


class NoDevice(Device):
    """All KV is in the host's memory."""

    piece_bytes = 1 << 23
    side = NoStream()

    def holds(self, memory: torch.Tensor) -> bool:
        return False

    def share(self, memory: torch.Tensor) -> DeviceHandle:
        raise AssertionError("it holds nothing")

    def check(self, handle: DeviceHandle) -> None:
        raise ValueError(f"memory on GPU {handle.gpu}: expected KV in host memory, as this process's is")

    def open(self, handle: DeviceHandle) -> torch.Tensor:
        raise AssertionError("a move to it is refused")


class Gpu(Device):
    """GPU number `index` of this process. Its copies run on a stream of their own."""

    piece_bytes = 1 << 31  # one or two milliseconds within a GPU; the host takes a tenth of that for each

    def __init__(self, index: int) -> None:
        self._index, self._device = index, torch.device("cuda", index)
        self.side = SideStream(self._device)
        line, row = torch.zeros(_WARM_UP_BYTES, dtype=torch.uint8, device=self._device), np.zeros(1, np.int64)
        copy_rows(line, row, line.clone(), row, _WARM_UP_BYTES)  # compiles the kernel before anybody waits for it

    def holds(self, memory: torch.Tensor) -> bool:
        return memory.device == self._device

    def share(self, memory: torch.Tensor) -> DeviceHandle:
        storage = memory.untyped_storage()
        if memory.storage_offset() or memory.numel() * memory.itemsize != storage.nbytes():
            raise ValueError(f"a part of a storage on {memory.device}: expected all {storage.nbytes()} bytes of it")
        torch.cuda.synchronize(self._device)  # what it was filled with is there
        _, segment, num_bytes, start_bytes, counter, counter_index, _, _ = storage._share_cuda_()  # type: ignore[no-untyped-call] # torch annotates no storage's IPC calls
        torch.UntypedStorage._release_ipc_counter_cuda(counter, counter_index)
        return DeviceHandle(_uuid(self._index), segment, start_bytes, num_bytes, counter, counter_index)

    def check(self, handle: DeviceHandle) -> None:
        seen = {_uuid(index): index for index in range(torch.cuda.device_count())}
        if handle.gpu not in seen:
            raise ValueError(f"memory on GPU {handle.gpu}: expected one that this process sees: {', '.join(seen)}")
        index = seen[handle.gpu]
        if index != self._index and not torch.cuda.can_device_access_peer(self._index, index):
            raise ValueError(f"memory on GPU {index} cannot be written to from GPU {self._index}: expected peers")

    def open(self, handle: DeviceHandle) -> torch.Tensor:
        with torch.cuda.device(self._device):
            storage = torch.UntypedStorage._new_shared_cuda(
                self._index, handle.segment, handle.num_bytes, handle.start_bytes, handle.counter, handle.counter_index,
                b"", False,
            )  # fmt: skip # no event to wait for: the owner has waited
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
