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
        self._is_behind = False  # whether those that wait have still to follow what took the place of a block
        pool.followers.append(self._fall_behind)

    def publish(self, request: Request) -> None:
        """Indexes the request's computed full blocks and retains those that somebody else computed first.

        It keeps its own copies of those too: block tables are append-only.
        """
        tokens, blocks = self._full_blocks(request)
        if self._publishes and len(tokens) != request.num_published:
            self._hold(request, self._pool.publish(tokens, blocks))
            request.num_published = len(tokens)

    def publish_again(self, request: Request) -> None:
        """The same for one whose blocks are no longer, or not known to be, those of the index."""
        request.num_published = 0
        self.publish(request)

    def follow(self, waiting: Iterable[Request]) -> None:
        """Where another copy has taken a block's place in the index, those that wait with that block hold the copy too.

        What runs lies in HBM, where a block that is used keeps its place.
        """
        if self._publishes and self._is_behind:
            for request in waiting:  # they use nothing by that: what they have published is looked at, not looked up
                self._hold(request, self._pool.index.peek(self._full_blocks(request)[0]).blocks)
        self._is_behind = False

    def _fall_behind(self, old: np.ndarray, new: np.ndarray) -> None:
        self._is_behind = True

    def _full_blocks(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """int32: the tokens of the request's computed full blocks, and those."""
        num_full = request.num_computed // self._pool.block_size
        return request.tokens.view[: num_full * self._pool.block_size], request.block_table.view[:num_full]

    def _hold(self, request: Request, canonical: np.ndarray) -> None:
        """The request holds what the index has of its path, its own copies or not."""
        theirs = canonical[canonical != request.block_table.view[: len(canonical)]]
        if len(theirs):
            self._pool.hold(theirs, request.holder)
