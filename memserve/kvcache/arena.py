"""Arena: the memory behind a pool's blocks, one tensor a medium. Knows its layout; never which block is in use."""

import numpy as np
import torch

from memserve.kvcache.layout import CacheGeometry, Layout


class Arena:
    """`num_blocks` blocks of `geometry` laid out by `layout` on `device`, zero-filled; page-locked if `pinned`.

    tensor: the contiguous memory, shaped by the layout.  kv: the same as [L, 2, N, B, K, D], a strided view.
    Raises MemoryError, naming the bytes asked for, when they cannot be had.
    """

    def __init__(
        self, layout: Layout, geometry: CacheGeometry, num_blocks: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        self.num_bytes = num_blocks * geometry.block_bytes
        try:
            self.tensor = torch.zeros(
                layout.shape(geometry, num_blocks), dtype=geometry.dtype, device=device, pin_memory=pinned
            )
        except RuntimeError as error:
            gib = self.num_bytes / 2**30
            raise MemoryError(f"{num_blocks} KV blocks need {gib:.2f} GiB on {device}: {error}") from error
        self.kv = layout.view(self.tensor)


class TwoTiers:
    """The arenas of HBM and DRAM under one numbering: blocks from `hbm`'s size on lie in `dram`."""

    def __init__(self, hbm: Arena, dram: Arena, num_hbm_blocks: int) -> None:
        self._arenas = (hbm, dram)
        self._num_hbm_blocks = num_hbm_blocks

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies the contents of blocks `source` (int32 [n], all in one medium) to `target`, in the other."""
        if not len(source):
            return
        (from_arena, from_blocks), (to_arena, to_blocks) = self._locate(source), self._locate(target)
        moved = from_arena.kv[:, :, from_blocks].to(to_arena.kv.device, non_blocking=True)
        to_arena.kv[:, :, to_blocks] = moved

    def _locate(self, blocks: np.ndarray) -> tuple[Arena, torch.Tensor]:
        """The arena of blocks of one medium, and their numbers in it."""
        in_dram = bool(blocks[0] >= self._num_hbm_blocks)
        assert ((blocks >= self._num_hbm_blocks) == in_dram).all(), "blocks of two media in one copy"
        arena = self._arenas[in_dram]
        numbers = blocks.astype(np.int64) - (self._num_hbm_blocks if in_dram else 0)
        return arena, torch.from_numpy(numbers).to(arena.kv.device)
