"""Preemption: what happens to a running request whose blocks are needed. Knows blocks by number only."""

from abc import ABC, abstractmethod

import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.request import Request


class Preemption(ABC):
    """Takes a running request's blocks away, so that it can be admitted again later."""

    @abstractmethod
    def preempt(self, request: Request, pool: BlockPool) -> None:
        """Frees what the request holds and sets its borders to what it will have when it comes back.

        What it had computed is in the index by now, where the mode keeps it there at all.
        """


def preempt(preemption: Preemption, request: Request, pool: BlockPool) -> None:
    """Has a request preempted. Raises ValueError where its blocks are not free then for others, or are lost."""
    preemption.preempt(request, pool)
    table, name = request.block_table.view, f"{type(preemption).__name__}.preempt"
    kept = table[(table < pool.num_blocks) & (pool.allocator.refcounts[table] <= 3)]  # of its own and the index at most
    if len(kept):
        raise ValueError(f"{name} left {request.request_id!r} blocks {kept.tolist()} in HBM that nobody else uses: "
                         "expected them to be freed, or moved to DRAM")  # fmt: skip
    held = pool.allocator.held_by(request.holder)
    if len(held) and not len(table) or len(np.setdiff1d(table, held)):
        raise ValueError(f"{name} left {request.request_id!r} blocks {held.tolist()} and a block table of "
                         f"{table.tolist()}: expected that to be what it holds")  # fmt: skip


class Recompute(Preemption):
    """Drops the KV. What of it is in the index stays there until somebody needs the blocks."""

    def preempt(self, request: Request, pool: BlockPool) -> None:
        pool.release_all(request.holder)
        request.block_table.truncate(0)
        request.num_computed = 0


class SwapOut(Preemption):
    """Moves the KV to DRAM, the partial tail too; what the index has of it stays there, and the request holds all.

    What others use as well stays in HBM. A request that DRAM has no room for is recomputed instead.
    """

    def preempt(self, request: Request, pool: BlockPool) -> None:
        num_used = pool.blocks_for(request.num_computed)
        pool.release(request.block_table.view[num_used:], request.holder)
        table = pool.move_out(request.block_table.view[:num_used], request.holder)
        if table is None:
            Recompute().preempt(request, pool)
            return
        request.block_table.truncate(0)
        request.block_table.extend(table)
