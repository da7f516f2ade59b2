"""FixedCostModel: a step costs a fixed time plus a time per token. Knows no machine; for repeatable virtual time."""

import numpy as np

from memserve.clock import to_ns
from memserve.request import ScheduledBatch


class FixedCostModel:
    """step_s + prefill_token_s * prefill tokens + decode_token_s * decode tokens, for each step of a batch.

    Before the first step comes swap_block_s for each block moved between HBM and DRAM. A request that computes one
    token and samples from it counts as a decode token. Seconds; none may be negative.
    """

    def __init__(self, step_s: float, prefill_token_s: float, decode_token_s: float, swap_block_s: float = 0.0) -> None:
        costs = {"step_s": step_s, "prefill_token_s": prefill_token_s, "decode_token_s": decode_token_s}
        for name, value in {**costs, "swap_block_s": swap_block_s}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"cost_model.{name}={value}: expected a finite number of seconds >= 0")
        if not any(costs.values()):
            raise ValueError(f"cost_model={costs}: time would stand still, expected a cost above 0")
        self._step_s, self._prefill_token_s = step_s, prefill_token_s
        self._step_ns = to_ns(step_s)
        self._prefill_token_ns = to_ns(prefill_token_s)
        self._decode_token_ns = to_ns(decode_token_s)
        self._swap_block_ns = to_ns(swap_block_s)

    def exec_time_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """Seconds to prefill num_new tokens behind num_cached ones, alone in one step: int64 [n] each -> float64 [n].

        What is cached costs nothing.
        """
        return self._step_s + self._prefill_token_s * np.asarray(num_new, dtype=np.float64)

    def step_times_ns(self, batch: ScheduledBatch) -> list[int]:
        """Nanoseconds of each of the batch's `num_steps` steps; at least 1 each."""
        num_decode = sum(n == 1 and samples for n, samples in zip(batch.num_new, batch.samples, strict=True))
        num_prefill = sum(batch.num_new) - num_decode
        step = self._step_ns + num_prefill * self._prefill_token_ns + num_decode * self._decode_token_ns
        times = [max(step, 1)] * batch.num_steps
        times[0] += batch.num_swapped_blocks * self._swap_block_ns
        return times
