"""Preemption: what happens to a running request whose blocks are needed. Knows blocks by number only."""

from abc import ABC, abstractmethod

from memserve.kvcache.block_pool import BlockPool
from memserve.request import Request


class Preemption(ABC):
    """Takes a running request's blocks away, so that it can be admitted again later."""

    @abstractmethod
    def preempt(self, request: Request, pool: BlockPool) -> None:
        """Frees what the request holds and sets its borders to what it will still have when it comes back."""


class Recompute(Preemption):
    """Drops the KV. What it had computed stays in the index until somebody needs the blocks."""

    def preempt(self, request: Request, pool: BlockPool) -> None:
        num_full = request.num_computed // pool.block_size
        num_tokens = num_full * pool.block_size
        pool.publish(request.tokens.view[:num_tokens], request.block_table.view[:num_full])
        pool.release_all(request.holder)
        request.block_table.truncate(0)
        request.num_computed = 0
