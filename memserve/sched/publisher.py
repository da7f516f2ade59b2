"""Publisher: enters what requests have computed into their pool's index. Knows blocks by number only; decides nothing.

Whoever uses a cached block holds those before it too: eviction takes leaves first, so a block above one in use would
count as evictable and not be. A request holds what it was given from the index, what it has published, and, beside its
own copies, what somebody else computed first.
"""

from collections.abc import Iterable

import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.request import Request


class Publisher:
    """publishes: whether what is computed here enters the index."""

    def __init__(self, pool: BlockPool, publishes: bool) -> None:
        self._pool, self._publishes = pool, publishes
        self._num_displaced = 0  # of the pool's, what those that wait have followed

    def publish(self, request: Request) -> None:
        """Indexes the request's computed full blocks and retains those that somebody else computed first.

        It keeps its own copies of those too: block tables are append-only.
        """
        num_full = request.num_computed // self._pool.block_size
        num_tokens = num_full * self._pool.block_size
        if not self._publishes or num_tokens == request.num_published:
            return
        blocks = request.block_table.view[:num_full]
        canonical = self._pool.publish(request.tokens.view[:num_tokens], blocks)
        theirs = canonical[canonical != blocks]
        if len(theirs):
            held = self._pool.allocator.held_by(request.holder)
            self._pool.retain(theirs[~np.isin(theirs, held)], request.holder)
        request.num_published = num_tokens

    def publish_again(self, request: Request) -> None:
        """The same for one whose blocks are no longer, or not known to be, those of the index."""
        request.num_published = 0
        self.publish(request)

    def follow(self, waiting: Iterable[Request]) -> None:
        """Where another copy has taken a block's place in the index, those that wait with that block hold the copy too.

        What runs lies in HBM, where a block that is used keeps its place.
        """
        if self._num_displaced != self._pool.num_displaced:
            self._num_displaced = self._pool.num_displaced
            for request in waiting:
                self.publish_again(request)
