"""Arena: the memory behind a pool's blocks, one tensor a medium. Knows its layout; never which block is in use."""

import numpy as np
import torch

from memserve.config.sizes import bytes_text
from memserve.kvcache.copy_engine import BlockCopier
from memserve.kvcache.layout import CacheGeometry, Layout
from memserve.kvcache.regions import regions_of, row_bytes_of
from memserve.transfer.block_copy import copy_rows
from memserve.transfer.shared_memory import SharedHandle, SharedMemory, available_bytes, page_lock


def as_device(value: torch.device | str, name: str = "device") -> torch.device:
    """A device that memory can be had on. Raises ValueError, naming the value, for one that this machine has not."""
    expected = f"{name}={value!s}: expected cpu, or a device of this machine"
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"{expected} ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ValueError(f"{expected}, which keeps what is written")
    return device


class Arena:
    """`num_blocks` blocks of `geometry` by `layout` on `device`, zero-filled; on a host page-locked if `pinned`.

    tensor: the contiguous memory, shaped by the layout.  kv: the same as [L, 2, N, B, K, D], a strided view.
    shared: by which another process maps the same bytes; None for a device's memory, or none.
    Raises MemoryError, naming the bytes asked for, when they cannot be had; a host's are compared with what is
    available before any is touched; ValueError for a layout or a geometry that is none.
    """

    def __init__(
        self, layout: Layout, geometry: CacheGeometry, num_blocks: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        if not isinstance(layout, Layout):
            raise ValueError(f"layout={layout!r}: expected an object of a Layout, such as DiscreteLayout()")
        if not isinstance(geometry, CacheGeometry):
            raise ValueError(f"geometry={geometry!r}: expected a CacheGeometry")
        self.layout, self.geometry, self.num_blocks = layout, geometry, num_blocks
        self.num_bytes = num_blocks * geometry.block_bytes
        self._memory: SharedMemory | None = None
        try:
            self.tensor = self._allocated(device, pinned)
        except (RuntimeError, OSError) as error:
            raise MemoryError(f"{self._wish(device)}: {error}") from error
        self.kv = layout.view(self.tensor)

    @property
    def shared(self) -> SharedHandle | None:
        return None if self._memory is None else self._memory.handle

    def _allocated(self, device: torch.device, pinned: bool) -> torch.Tensor:
        shape, dtype = self.layout.shape(self.geometry, self.num_blocks), self.geometry.dtype
        if device.type == "cpu":
            available = available_bytes()
            if available is not None and self.num_bytes > available:
                raise MemoryError(f"{self._wish(device)}: {bytes_text(available)} are available")
        if device.type != "cpu" or not self.num_bytes:
            return torch.zeros(shape, dtype=dtype, device=device)
        self._memory = SharedMemory(self.num_bytes)
        if pinned:
            page_lock(self._memory)
        return self._memory.bytes.view(dtype).view(shape)

    def _wish(self, device: torch.device) -> str:
        return f"{self.num_blocks} KV blocks need {self.num_bytes} bytes ({bytes_text(self.num_bytes)}) on {device}"


class TwoTiers(BlockCopier):
    """The arenas of HBM and DRAM under one numbering: blocks from `hbm`'s size on lie in `dram`."""

    def __init__(self, hbm: Arena, dram: Arena, num_hbm_blocks: int) -> None:
        self._arenas = (hbm, dram)
        self.device = hbm.tensor.device
        self._num_hbm_blocks = num_hbm_blocks

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies the contents of blocks `source` (int32 [n], all in one medium) to `target`, in the other."""
        if not len(source):
            return
        (from_arena, from_blocks), (to_arena, to_blocks) = self._locate(source), self._locate(target)
        row_bytes = min(row_bytes_of(arena.layout, arena.geometry) for arena in self._arenas)
        from_rows, to_rows = (
            regions_of(arena.layout, arena.geometry, arena.num_blocks, blocks, row_bytes=row_bytes).rows
            for arena, blocks in ((from_arena, from_blocks), (to_arena, to_blocks))
        )
        copy_rows(from_arena.tensor, from_rows, to_arena.tensor, to_rows, row_bytes)

    def _locate(self, blocks: np.ndarray) -> tuple[Arena, np.ndarray]:
        """The arena of blocks of one medium, and their numbers in it."""
        in_dram = bool(blocks[0] >= self._num_hbm_blocks)
        assert ((blocks >= self._num_hbm_blocks) == in_dram).all(), "blocks of two media in one copy"
        return self._arenas[in_dram], blocks - (self._num_hbm_blocks if in_dram else 0)
