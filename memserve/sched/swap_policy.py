"""Swap policy: whether cached KV that lies in DRAM is brought back, or computed again. Knows blocks by number only."""

from abc import ABC, abstractmethod

import numpy as np

from memserve.sched.cost_model.base import CostModel
from memserve.values import given_int


class SwapPolicy(ABC):
    """What to do with a match that is partly in DRAM."""

    @abstractmethod
    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int, num_tokens: int) -> int:
        """How many of a match's first blocks (int32 [n]; those from num_hbm_blocks on lie in DRAM) to use.

        num_tokens: of the request, those that are cached included.
        """

    def used(self, blocks: np.ndarray, num_hbm_blocks: int, num_tokens: int) -> np.ndarray:
        """Those blocks. Raises ValueError for a number that is none of theirs."""
        num = self.num_to_use(blocks, num_hbm_blocks, num_tokens)
        return blocks[: given_int(self, "num_to_use", num, 0, len(blocks), unit="blocks of those cached")]


class Always(SwapPolicy):
    """Swap in whatever is cached."""

    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int, num_tokens: int) -> int:
        return len(blocks)


class Never(SwapPolicy):
    """Use what lies in HBM and compute the rest again."""

    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int, num_tokens: int) -> int:
        in_dram = np.flatnonzero(blocks >= num_hbm_blocks)
        return int(in_dram[0]) if len(in_dram) else len(blocks)


class Cheapest(SwapPolicy):
    """Use as many blocks as makes swapping them in and computing the rest take the least seconds; of equals the most.

    costs: its prices.  block_size: tokens.
    """

    def __init__(self, costs: CostModel, block_size: int) -> None:
        self._costs, self._block_size = costs, block_size

    def num_to_use(self, blocks: np.ndarray, num_hbm_blocks: int, num_tokens: int) -> int:
        in_dram = np.concatenate(([0], np.cumsum(blocks >= num_hbm_blocks)))
        if not in_dram[-1]:
            return len(blocks)
        num_cached = np.arange(len(in_dram)) * self._block_size
        computing_s = self._costs.exec_time_s(num_cached, num_tokens - num_cached)
        seconds = computing_s + self._costs.swap_time_s(1) * in_dram
        return len(blocks) - int(np.argmin(seconds[::-1]))
