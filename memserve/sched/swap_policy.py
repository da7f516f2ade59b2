"""Swap policy: whether cached KV that lies in DRAM is brought back, or computed again. Knows blocks by number only."""

from abc import ABC, abstractmethod

import numpy as np


class SwapPolicy(ABC):
    """What to do with a match that is partly in DRAM."""

    @abstractmethod
    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int) -> int:
        """How many of a match's first blocks (int32 [n]; those from num_hbm_blocks on lie in DRAM) to use."""


class Always(SwapPolicy):
    """Swap in whatever is cached."""

    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int) -> int:
        return len(blocks)


class Never(SwapPolicy):
    """Use what lies in HBM and compute the rest again."""

    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int) -> int:
        in_dram = np.flatnonzero(blocks >= num_hbm_blocks)
        return int(in_dram[0]) if len(in_dram) else len(blocks)
