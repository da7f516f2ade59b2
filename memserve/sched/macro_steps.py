"""Macro-steps: how often a decode step can be repeated before anything could change, and who needs a block when."""

from collections.abc import Sequence

from memserve.kvcache.block_pool import BlockPool
from memserve.request import Request, ScheduledBatch


def most_steps(batch: ScheduledBatch, running: Sequence[Request], pool: BlockPool, num_kept_free: int) -> int:
    """Steps until anybody ends, needs a block that is not there, or could join. num_kept_free: blocks of HBM.

    1 unless every request decodes and its length is known beforehand, and while blocks are on their way.
    """
    decoding = all(r.num_computed >= r.prefill_end and not r.params.can_stop_early for r in batch.requests)
    if not decoding or len(batch.requests) < len(running) or pool.num_swapping:
        return 1
    most = max(min(r.max_num_tokens - r.num_tokens for r in batch.requests), 1)
    return _steps_within(batch, most, pool.block_size, pool.num_unmoved - num_kept_free)


def steps_before_eviction(batch: ScheduledBatch, pool: BlockPool) -> int:
    """How many of a batch's steps, from its first on, free blocks are enough for."""
    return _steps_within(batch, batch.num_steps, pool.block_size, pool.allocator.num_free)


def _steps_within(batch: ScheduledBatch, most: int, size: int, num_more: int) -> int:
    """The largest number of steps, from 1 to `most`, for which the requests' blocks and num_more are enough."""
    computed = [r.num_computed for r in batch.requests]
    num_blocks = sum(len(r.block_table) for r in batch.requests) + num_more
    filled = (num_blocks * size - sum(computed)) // len(computed)  # steps, if they could fill every block to its end
    high = max(min(filled, most), 1)
    low = max(min(filled - (size - 1), most), 1)  # but each request's last block may have a single token
    while low < high:  # the largest number of steps whose blocks can be had
        middle = (low + high + 1) // 2
        fits = sum(-(-(done + middle) // size) for done in computed) <= num_blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def growth(batch: ScheduledBatch, block_size: int) -> list[Request]:
    """Who needs each block of the repeated steps.

    In the order in which the steps, one by one, would take them: which blocks are neighbours in memory decides how many
    network calls move them (`granularity.merge`).
    """
    needed = [
        (block * block_size - request.num_computed, place, block)
        for place, request in enumerate(batch.requests)
        for block in range(len(request.block_table), -(-(request.num_computed + batch.num_steps) // block_size))
    ]
    return [batch.requests[place] for _, place, _ in sorted(needed)]
