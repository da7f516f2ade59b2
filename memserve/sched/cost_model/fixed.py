"""FixedCostModel: a step costs a fixed time plus a time per token. Knows no machine; for repeatable virtual time."""

import numpy as np

from memserve.clock import to_ns
from memserve.request import ScheduledBatch
from memserve.sched.cost_model.base import SWAP_BLOCK_TOKENS, CostModel, require_seconds


class FixedCostModel(CostModel):
    """step_s + prefill_token_s * prefill tokens + decode_token_s * decode tokens, for each step of a batch.

    Before the first step comes swap_block_s for every swap_block_tokens tokens moved between HBM and DRAM, and
    swap_piece_s for every piece that they lie in. A request that computes one token and samples from it counts as a
    decode token. Seconds; none may be negative.
    """

    def __init__(
        self,
        step_s: float,
        prefill_token_s: float,
        decode_token_s: float,
        swap_block_s: float = 0.0,
        swap_block_tokens: int = SWAP_BLOCK_TOKENS,
        swap_piece_s: float = 0.0,
    ) -> None:
        costs = {"step_s": step_s, "prefill_token_s": prefill_token_s, "decode_token_s": decode_token_s}
        require_seconds(**costs)
        if not any(costs.values()):
            raise ValueError(f"cost_model={costs}: time would stand still, expected a cost above 0")
        self._price_swaps(swap_block_s, swap_block_tokens, swap_piece_s)
        self._step_s, self._prefill_token_s, self._decode_token_s = step_s, prefill_token_s, decode_token_s

    def _one_s(self, num_cached: int, num_new: int) -> float:
        return self._step_s + self._prefill_token_s * num_new

    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        return np.where(num_new > 0, self._step_s + self._prefill_token_s * num_new, 0.0)

    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        num_decode = int(np.count_nonzero(num_new == 1))
        tokens_s = self._prefill_token_s * (int(num_new.sum()) - num_decode) + self._decode_token_s * num_decode
        return np.full(len(num_more), self._step_s + tokens_s)

    def step_times_ns(self, batch: ScheduledBatch) -> list[int]:
        """As every model's, but a last chunk of one token is a decode token only if it is sampled from.

        A subclass with a step_time_s of its own is asked that.
        """
        if type(self).step_time_s is not FixedCostModel.step_time_s:
            return super().step_times_ns(batch)
        num_decode = sum(n == 1 and samples for n, samples in zip(batch.num_new, batch.samples, strict=True))
        num_prefill = sum(batch.num_new) - num_decode
        step = (
            to_ns(self._step_s) + num_prefill * to_ns(self._prefill_token_s) + num_decode * to_ns(self._decode_token_s)
        )
        times = [max(step, 1)] * batch.num_steps
        times[0] += to_ns(self.swap_time_s(batch.num_swapped_blocks))
        return times
