"""Arena: the memory behind a pool's blocks, one tensor a medium. Knows its layout; never which block is in use."""

import torch

from memserve.kvcache.layout import CacheGeometry, Layout


class Arena:
    """`num_blocks` blocks of `geometry` laid out by `layout` on `device`, zero-filled.

    tensor: the contiguous memory, shaped by the layout.  kv: the same as [L, 2, N, B, K, D], a strided view.
    Raises MemoryError, naming the bytes asked for, when they cannot be had.
    """

    def __init__(self, layout: Layout, geometry: CacheGeometry, num_blocks: int, device: torch.device) -> None:
        self.num_bytes = num_blocks * geometry.block_bytes
        try:
            self.tensor = torch.zeros(layout.shape(geometry, num_blocks), dtype=geometry.dtype, device=device)
        except RuntimeError as error:
            gib = self.num_bytes / 2**30
            raise MemoryError(f"{num_blocks} KV blocks need {gib:.2f} GiB on {device}: {error}") from error
        self.kv = layout.view(self.tensor)
