"""CostModel: the seconds that prefilling, decoding and swapping will take (section 5.3). Knows no clock, no tensor.

Whoever weighs one thing against another asks here: routing (Eq. 1), fetching (Eq. 2), swapping, eviction; and virtual
time itself (`step_time=model`).
"""

from abc import ABC, abstractmethod
from typing import overload

import msgspec
import numpy as np

from memserve.clock import MAX_S, to_ns
from memserve.request import ScheduledBatch
from memserve.values import is_number, require_duration, require_int, wrong_return


class Subject(msgspec.Struct, frozen=True):
    """What costs are of. machine: its processor's or GPU's name.  cores, threads: usable, and torch's.

    shape: the model's sizes by name, empty where no model runs.  tensor_parallel: ranks that share it.
    kv: what a token's KV is on one rank (num_layers, num_kv_heads, head_dim, bytes_per_element), where it is a model's.
    """

    machine: str
    cores: int
    threads: int
    shape: dict[str, int] = {}
    dtype: str = ""
    attention: str = ""
    tensor_parallel: int = 1
    kv: dict[str, int] = {}


_AT_MOST = "and at most 146 years"  # as to_ns has it
SWAP_BLOCK_TOKENS = 16  # of the block that swap_block_s is of, unless it is said


class CostModel(ABC):
    """Predicts seconds. x cached tokens and y new ones of a prompt are exec(x, y) in this package.

    swap_block_s: of the bytes of a block of swap_block_tokens tokens moved between HBM and DRAM.  swap_piece_s: of each
    copy of a piece beside its bytes.  block_size, pieces_per_block: tokens of the run's blocks, and the contiguous
    pieces that one is made of by the run's layout (2L discrete, 1 aggregated: section 5.2); who builds the model sets
    them, until then blocks have swap_block_tokens, in one piece.
    """

    swap_block_s: float
    swap_block_tokens: int = SWAP_BLOCK_TOKENS
    swap_piece_s: float = 0.0
    block_size: int | None = None
    pieces_per_block: int = 1

    @overload
    def exec_time_s(self, num_cached: int, num_new: int) -> float: ...

    @overload
    def exec_time_s(self, num_cached: np.ndarray, num_new: np.ndarray | int) -> np.ndarray: ...

    def exec_time_s(self, num_cached: int | np.ndarray, num_new: int | np.ndarray) -> float | np.ndarray:
        """Seconds of one step that prefills num_new tokens of one prompt behind num_cached ones, alone.

        Numbers, or int64 columns [n] of which one may be a number: float64 [n]. 0 where there is nothing to compute.
        Raises ValueError where the model gives no such seconds.
        """
        if isinstance(num_cached, np.ndarray) or isinstance(num_new, np.ndarray):
            columns = np.broadcast_arrays(num_cached, num_new)
            return self._seconds("_column_s", self._column_s(*columns), len(columns[0]))
        if num_new <= 0:
            return 0.0
        seconds = self._one_s(num_cached, num_new)
        if not is_number(seconds) or not 0 <= seconds <= MAX_S:
            raise wrong_return(self, "_one_s", seconds, f"a number of seconds >= 0, {_AT_MOST}")
        return seconds

    @abstractmethod
    def _one_s(self, num_cached: int, num_new: int) -> float:
        """exec_time_s of numbers, num_new above 0: in plain Python, which is faster than NumPy for one."""

    @abstractmethod
    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """exec_time_s of columns."""

    @abstractmethod
    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        """Seconds of a step over requests with these columns (int64 [R]); float64, one for each of num_more.

        num_more: int64 [S], tokens by which each request has grown since: a batch that is repeated.
        """

    def steps_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        """step_time_s, for who asks. Raises ValueError where that gives no such seconds."""
        return self._seconds("step_time_s", self.step_time_s(num_cached, num_new, num_more), len(num_more))

    def _seconds(self, method: str, given: object, length: int) -> np.ndarray:
        """What one of the methods gave, if that is a column of so many seconds."""
        seconds = np.asarray(given)
        if seconds.shape != (length,) or seconds.dtype.kind not in "fiu" or (length and not _are_seconds(seconds)):
            raise wrong_return(self, method, seconds.tolist(), f"{length} numbers of seconds >= 0, {_AT_MOST}")
        return seconds

    def _price_swaps(self, swap_block_s: float, swap_block_tokens: int, swap_piece_s: float) -> None:
        """Keeps the price. Raises ValueError for one that is none."""
        require_seconds(swap_block_s=swap_block_s, swap_piece_s=swap_piece_s)
        require_int("cost_model.swap_block_tokens", swap_block_tokens, 1)
        self.swap_block_s, self.swap_block_tokens, self.swap_piece_s = swap_block_s, swap_block_tokens, swap_piece_s

    def swap_time_s(self, num_blocks: int) -> float:
        """Seconds to move blocks of the run between HBM and DRAM, one after the other, before a step: so many for each
        of their tokens, and of their pieces.
        """
        size = self.swap_block_tokens if self.block_size is None else self.block_size
        bytes_s = self.swap_block_s * num_blocks * size / self.swap_block_tokens
        return bytes_s + self.swap_piece_s * num_blocks * self.pieces_per_block

    def step_times_ns(self, batch: ScheduledBatch) -> list[int]:
        """Nanoseconds of each of the batch's `num_steps` steps, at least 1; what was swapped comes before the first.

        Raises ValueError for a step_time_s that gives no such seconds.
        """
        num_cached = np.array([r.num_computed for r in batch.requests], dtype=np.int64)
        num_new = np.array(batch.num_new, dtype=np.int64)
        seconds = self.steps_s(num_cached, num_new, np.arange(batch.num_steps))
        times = [max(to_ns(s), 1) for s in seconds.tolist()]
        times[0] += to_ns(self.swap_time_s(batch.num_swapped_blocks))
        return times

    def check(self, subject: Subject) -> None:  # noqa: B027 # nothing is to be checked of most models: empty, not abstract
        """Raises ValueError if the costs are not of what is about to run."""

    def check_pool(self, num_bytes: int) -> None:  # noqa: B027 # as above
        """Raises ValueError where a GPU that is known has no room for an instance's blocks of so many bytes a rank."""


def attention_tokens(costs: CostModel, num_tokens: int = 4096) -> float:
    """The prefix length at which a token costs twice as much as the first ones: from the curvature of exec(0, y).

    Between y = num_tokens / 2 and num_tokens. Infinity where a token costs the same at any position.
    """
    half, most, full = (costs.exec_time_s(0, num_tokens * i // 4) for i in (2, 3, 4))
    per_token, growth = (most - half) * 4 / num_tokens, (full - 2 * most + half) * 16 / num_tokens**2
    if growth <= 1e-6 * per_token / num_tokens:  # rounding of a straight line
        return float("inf")
    return max(per_token / growth - num_tokens * 5 / 8, 1.0)


def _are_seconds(numbers: np.ndarray) -> bool:
    """Of NaN the smallest and the largest are NaN, which is in no order."""
    return bool(numbers.min() >= 0 and numbers.max() <= MAX_S)


def require_seconds(**values: float) -> None:
    """Raises ValueError naming the first of `values` that is no number of seconds from 0 to LONGEST_S."""
    for name, value in values.items():
        require_duration(f"cost_model.{name}", value)
