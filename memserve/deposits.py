"""Deposits: KV that is cached on an instance goes to the cluster's store (`store=`). Sans-IO.

    offer -> a prefix waits -> its turn: what is cached of it then, by a best-effort transfer_with_insert to DRAM there
          -> DONE, declined for want of room, or FAILED: the next one's turn
    nothing waits -> what would be evicted next and was not offered, where the policy looks ahead: its turn
    the store's process is gone -> nothing is offered any more

One prefix is on its way at a time and holds its blocks; those that wait hold nothing, so that a slow link keeps no
more of the pool from who runs here. What the store has already is not sent: its Grant says how much that is. What was
offered is noted at its blocks (Allocator.offered), with all before it, for as long as it is cached here. No request
waits for any of it.
"""

from collections import deque

import msgspec
import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.ticket import Arrival, Ticket, TicketState, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.sched.store_policy import StorePolicy
from memserve.values import given_int


class Deposited(msgspec.Struct, frozen=True, tag=True):
    """KV that the receiver, a store, is to keep."""


_WORD = msgspec.msgpack.encode(Deposited())
_OPTIONS = TransferOptions(insert=True, medium=Medium.DRAM, best_effort=True)


class Deposits:
    """One instance's. store: the incarnation of who keeps it; None where nobody does."""

    def __init__(self, transfers: Transfers, pool: BlockPool, policy: StorePolicy, store: int | None) -> None:
        self._transfers, self._pool, self._policy, self._store = transfers, pool, policy, store
        pool.index.counts_apart = store is not None and policy.asks_index
        self._num_ahead = given_int(policy, "num_ahead", policy.num_ahead(pool.num_blocks), 0, unit="blocks")
        self._num_too_late = 0  # tokens
        self._waiting: deque[np.ndarray] = deque()
        self._ticket: Ticket | None = None
        self._sent = np.empty(0, dtype=np.int32)  # whose ticket that is
        self._is_leaving = False  # it was about to be evicted

    @property
    def num_dropped(self) -> int:
        """Tokens that waited too long: more prefixes waited than may, or they were not cached any more. With a policy
        that looks ahead, also what was evicted before its turn.
        """
        num_evicted = self._pool.allocator.num_evicted_unoffered if self._num_ahead else 0
        return self._num_too_late + num_evicted * self._pool.block_size

    def offer(self, tokens: np.ndarray, now_ns: int) -> None:
        """The KV of these tokens (int32 [n]) is cached here, as far as it is in whole blocks, by a request that has
        ended here, or goes on elsewhere.
        """
        if self._store is None:
            return
        uses = self._pool.index.uses(tokens)
        num_blocks = given_int(
            self._policy, "num_offered", self._policy.num_offered(uses), 0, len(uses), unit="blocks of those cached"
        )
        if num_offered := num_blocks * self._pool.block_size:
            self._waiting.append(tokens[:num_offered].copy())
            if len(self._waiting) > self._policy.max_waiting:
                self._num_too_late += len(self._waiting.popleft())
        self._next(now_ns)

    def look_ahead(self, now_ns: int) -> None:
        """Requests that were admitted have taken blocks: others are nearer to being evicted."""
        if self._num_ahead and self._store is not None:
            self._next(now_ns)

    def came(self, arrival: Arrival) -> None:
        """KV that was fetched: what comes from the store need not go there."""
        if arrival.ticket_id[0] == self._store:
            self._note(arrival.tokens)

    def ended(self, ticket: Ticket, now_ns: int) -> None:
        """A transfer of this instance has ended. What is leaving is offered once, or one that the store does not take
        would keep the next ones from their turn; the rest again when it is used.
        """
        if ticket is self._ticket:
            self._ticket = None
            if self._is_leaving or ticket.state is TicketState.DONE:
                self._note(self._sent)
            self._next(now_ns)

    def _note(self, tokens: np.ndarray) -> None:
        """What is cached of these tokens was offered."""
        self._pool.allocator.offered[self._pool.index.peek(tokens).blocks] = True

    def _next(self, now_ns: int) -> None:
        """The next prefix leaves. That is no use of it: its order of eviction stays."""
        assert self._store is not None, "a policy offers something where there is a store"
        if not self._transfers.knows(self._store):
            self._waiting.clear()
        elif self._ticket is None and (prefix := self._next_waiting() or self._next_out()) is not None:
            self._sent, blocks = prefix
            self._ticket = self._transfers.start(self._store, self._sent, blocks, _OPTIONS, _WORD, now_ns)

    def _next_waiting(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The first that waits, as far as it is still here and is to be offered: tokens, int32, and blocks, int32."""
        self._is_leaving = False
        while self._waiting:
            tokens = self._waiting.popleft()
            found = self._pool.index.peek(tokens)
            self._num_too_late += len(tokens) - found.num_tokens
            if found.num_tokens and (self._policy.renews or not self._pool.allocator.offered[found.blocks[-1]]):
                return tokens[: found.num_tokens], found.blocks
        return None

    def _next_out(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What would be evicted first of all that was not offered, while it is near: tokens, int32, blocks, int32.

        Evicted is what leaves the instance: while DRAM has free blocks, what is in HBM goes there.
        """
        self._is_leaving = True
        allocator = self._pool.allocator
        num_short = self._num_ahead - allocator.num_free - allocator.num_free_dram
        return self._pool.index.next_out(num_short, allocator.offered) if num_short > 0 else None
