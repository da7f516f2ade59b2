"""Macro-steps: how often a decode step can be repeated before anything could change. Decides nothing else."""

from collections.abc import Sequence

import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.request import Request, ScheduledBatch


def most_steps(batch: ScheduledBatch, running: Sequence[Request], pool: BlockPool, num_kept_free: int) -> int:
    """Steps until anybody ends, needs a block that is not there, or could join. num_kept_free: blocks of HBM.

    1 unless every request decodes and its length is known beforehand, and while blocks are on their way.
    """
    decoding = all(r.num_computed >= r.prefill_end and not r.params.can_stop_early for r in batch.requests)
    if not decoding or len(batch.requests) < len(running) or pool.num_swapping:
        return 1
    most = min(r.max_num_tokens - r.num_tokens for r in batch.requests)
    computed = np.array([r.num_computed for r in batch.requests])
    held = sum(len(r.block_table) for r in batch.requests)
    room = pool.num_unmoved - num_kept_free
    low, high = 1, max(most, 1)
    while low < high:  # the largest number of steps whose blocks can be had
        middle = (low + high + 1) // 2
        needed = int(np.sum(-(-(computed + middle) // pool.block_size))) - held
        low, high = (middle, high) if needed <= room else (low, middle - 1)
    return low
