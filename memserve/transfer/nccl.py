"""Nccl: Gloo's pairs with the bytes on NCCL's process groups, between devices; what is said goes over gloo still.

A peer's death breaks the gloo group, and whoever then detaches it aborts a call that waits in NCCL. Memory of a host is
staged through the device. Knows no KV. Not run between two devices so far: see the docs for what has been run where.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store, Work

from memserve.transfer.directory import Endpoint
from memserve.transfer.gloo import Gloo
from memserve.transfer.liveness import started_at
from memserve.transfer.shared_memory import host_id
from memserve.transfer.wire import NO_LIMIT, CallGroup, GlooCarrier, WireBroken


class NcclCarrier(GlooCarrier):
    """Groups of NCCL on one device."""

    def __init__(self, device: torch.device, host: str) -> None:
        super().__init__(host)
        self.device = device

    def open(self, store: Store, rank: int, patience: timedelta) -> CallGroup:
        """Its communicator is made by the first call, so only the gloo group beside it notices a peer that is late."""
        torch.cuda.set_device(self.device)  # of this thread
        options = distributed_c10d.ProcessGroupNCCL.Options()
        options._timeout = NO_LIMIT
        return cast(CallGroup, distributed_c10d.ProcessGroupNCCL(store, rank, 2, options))

    def finish(self, work: Work) -> None:
        """Waits here, not only on the stream: an acknowledgement says that the bytes are there."""
        try:
            work.wait()
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as error:
            raise WireBroken(str(error)) from error

    def close(self, group: CallGroup, rank: int) -> None:
        cast(distributed_c10d.ProcessGroupNCCL, group).abort()


class Nccl(Gloo):
    """One process's end. gpu: the number of the GPU that it sends from and receives on, and no other endpoint does.

    Raises ValueError where there is no such GPU, or a torch without NCCL; `attach` does for a GPU that another uses.
    """

    needs_gpu = True

    def __init__(self, store: Store, gpu: int, *, channels: int = 1, patience_s: float = 60.0, host: str = "") -> None:
        count = torch.cuda.device_count() if distributed_c10d.is_nccl_available() else 0
        if not 0 <= gpu < count:
            raise ValueError(f"transport=nccl on device {gpu}: expected one of {count} GPUs of a torch with NCCL")
        self._device = torch.device("cuda", gpu)
        super().__init__(store, channels=channels, patience_s=patience_s, host=host)

    @property
    def _kind(self) -> str:
        return "nccl"

    def _make_carrier(self) -> GlooCarrier:
        return NcclCarrier(self._device, self._host)

    def _described(self, memories: Sequence[torch.Tensor | None]) -> Endpoint:
        uuid = torch.cuda.get_device_properties(self._device).uuid
        pid, published = os.getpid(), super()._described(memories).memories
        return Endpoint(host_id(), pid, published, f"GPU {uuid}", started_at(pid))
