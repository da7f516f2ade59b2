"""ArchCostModel: exec as one fitted surface over (x, y), the alternative that section 5.3 rejects. Knows no operator.

Kept to be compared with: it has to be fitted again for every degree of parallelism, and it knows nothing of batches:
a step costs what its requests would cost one after the other.
"""

from collections.abc import Sequence

import numpy as np

from memserve.sched.cost_model.base import SWAP_BLOCK_TOKENS, CostModel

MIN_S = 1e-9  # a surface may dip below zero between its points; time may not


class ArchCostModel(CostModel):
    """seconds = s0 + s1 x + s2 y + s3 x^2 + s4 x y + s5 y^2, with x cached and y new tokens.

    surface: the six coefficients. Raises ValueError for another number of them, or one that is not finite.
    """

    def __init__(
        self, surface: Sequence[float], swap_block_s: float = 0.0, swap_block_tokens: int = SWAP_BLOCK_TOKENS
    ) -> None:
        if len(surface) != 6 or not np.isfinite(surface).all():
            raise ValueError(f"cost_model.surface={list(surface)}: expected 6 finite numbers")
        self._price_swaps(swap_block_s, swap_block_tokens, swap_piece_s=0.0)
        self._surface = [float(c) for c in surface]

    def arguments(self) -> dict[str, object]:
        """What makes a fitted model again; of how many tokens a block is that was swapped, its file says."""
        return {"surface": self._surface, "swap_block_s": self.swap_block_s}

    def _one_s(self, num_cached: int, num_new: int) -> float:
        x, y, (s0, s1, s2, s3, s4, s5) = num_cached, num_new, self._surface
        return max(s0 + s1 * x + s2 * y + s3 * x * x + s4 * x * y + s5 * y * y, MIN_S)

    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        seconds = np.maximum(arch_features(num_cached, num_new) @ self._surface, MIN_S)
        return np.where(num_new > 0, seconds, 0.0)

    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        return np.array([self._column_s(num_cached + more, num_new).sum() for more in num_more.tolist()])


def arch_features(num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
    """float64 [n, 6]: what the surface's coefficients are multiplied with."""
    x, y = num_cached.astype(np.float64), num_new.astype(np.float64)
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
