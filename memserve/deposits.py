"""Deposits: what requests leave in an instance's cache goes to the cluster's store (`store=`). Sans-IO.

    offer -> a prefix waits -> its turn: what is cached of it then, by a best-effort transfer_with_insert to DRAM there
          -> DONE, declined for want of room, or FAILED: the next one's turn
    the store's process is gone -> nothing is offered any more

One prefix is on its way at a time and holds its blocks; those that wait hold nothing, so that a slow link keeps no
more of the pool from who runs here. What the store has already is not sent: its Grant says how much that is. No request
waits for any of it.
"""

from collections import deque

import msgspec
import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.ticket import Ticket, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.sched.store_policy import StorePolicy


class Deposited(msgspec.Struct, frozen=True, tag=True):
    """KV that the receiver, a store, is to keep."""


_WORD = msgspec.msgpack.encode(Deposited())
_OPTIONS = TransferOptions(insert=True, medium=Medium.DRAM, best_effort=True)


class Deposits:
    """One instance's. store: the incarnation of who keeps it; None where the policy offers nothing.

    num_dropped: tokens that waited too long: more prefixes waited than may, or they were not cached any more.
    """

    def __init__(self, transfers: Transfers, pool: BlockPool, policy: StorePolicy, store: int | None) -> None:
        self.num_dropped = 0
        self._transfers, self._pool, self._policy, self._store = transfers, pool, policy, store
        self._waiting: deque[np.ndarray] = deque()
        self._ticket: Ticket | None = None

    def offer(self, tokens: np.ndarray, now_ns: int) -> None:
        """The KV of these tokens (int32 [n]) is cached here, as far as it is in whole blocks, by a request that has
        ended here, or goes on elsewhere.
        """
        if num_offered := self._policy.num_offered(len(tokens)) // self._pool.block_size * self._pool.block_size:
            self._waiting.append(tokens[:num_offered].copy())
            if len(self._waiting) > self._policy.max_waiting:
                self.num_dropped += len(self._waiting.popleft())
            self._next(now_ns)

    def ended(self, ticket: Ticket, now_ns: int) -> None:
        """A transfer of this instance has ended."""
        if ticket is self._ticket:
            self._ticket = None
            self._next(now_ns)

    def _next(self, now_ns: int) -> None:
        """The next prefix leaves, as far as it is still here. That is no use of it: its order of eviction stays."""
        assert self._store is not None, "a policy offers something where there is a store"
        if not self._transfers.knows(self._store):
            self._waiting.clear()
        while self._waiting and self._ticket is None:
            tokens = self._waiting.popleft()
            found = self._pool.index.peek(tokens)
            self.num_dropped += len(tokens) - found.num_tokens
            if found.num_tokens:
                sent = tokens[: found.num_tokens]
                self._ticket = self._transfers.start(self._store, sent, found.blocks, _OPTIONS, _WORD, now_ns)
