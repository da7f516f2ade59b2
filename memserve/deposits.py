"""Deposits: KV that is cached on an instance goes to one of the cluster's stores (`store=`). Sans-IO.

    offer -> a prefix waits -> its turn: what is cached of it then, by a best-effort transfer_with_insert to DRAM there
          -> DONE, declined for want of room, or FAILED: the next one's turn
          -> declined, since the store is busy with others: it waits again, until there is a new offer or prompt
    nothing waits -> what would be evicted next and was not offered, where the policy looks ahead: its turn
    a store's process is gone -> what it had been offered counts as offered to nobody; without any nothing is offered

One prefix is on its way at a time and holds its blocks; those that wait hold nothing, so that a slow link keeps no
more of the pool from who runs here. What the store has already is not sent: its Grant says how much that is. To whom
it was offered is noted at its blocks (Allocator.offered_to), with all before it, for as long as it is cached here. No
request waits for any of it.
"""

from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import NOBODY
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.sending import BUSY
from memserve.kvcache.ticket import Arrival, Ticket, TicketState, TransferOptions
from memserve.kvcache.transfers import Transfers
from memserve.sched.store_policy import StorePolicy
from memserve.values import given_int


class Deposited(msgspec.Struct, frozen=True, tag=True):
    """KV that the receiver, a store, is to keep."""


_WORD = msgspec.msgpack.encode(Deposited())
_OPTIONS = TransferOptions(insert=True, medium=Medium.DRAM, best_effort=True)


class Deposits:
    """One instance's. stores: the incarnations of who keeps it, ascending."""

    def __init__(self, transfers: Transfers, pool: BlockPool, policy: StorePolicy, stores: Sequence[int]) -> None:
        self._transfers, self._pool, self._policy, self._stores = transfers, pool, policy, tuple(stores)
        pool.index.counts_apart = bool(stores) and policy.asks_index
        self._num_ahead = given_int(policy, "num_ahead", policy.num_ahead(pool.num_blocks), 0, unit="blocks")
        self._num_too_late = 0  # tokens
        self._waiting: deque[np.ndarray] = deque()
        self._ticket: Ticket | None = None
        self._sent, self._sent_to = np.empty(0, dtype=np.int32), NOBODY  # whose ticket that is
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
        if not self._stores:
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
        if self._stores and (self._num_ahead or self._waiting):
            self._next(now_ns)

    def came(self, arrival: Arrival) -> None:
        """KV that was fetched: what comes from a store need not go there."""
        if arrival.ticket_id[0] in self._stores:
            self._note(arrival.tokens, arrival.ticket_id[0])

    def ended(self, ticket: Ticket, now_ns: int) -> None:
        """A transfer of this instance has ended. What is leaving is offered once, or one that the store does not take
        would keep the next ones from their turn; the rest again when it is used.
        """
        if ticket is not self._ticket:
            return
        self._ticket = None
        if not ticket.reason.startswith(BUSY):
            if self._is_leaving or ticket.state is TicketState.DONE:
                self._note(self._sent, self._sent_to)
            self._next(now_ns)
        elif not self._is_leaving:  # what is leaving is found again
            self._waiting.append(self._sent)

    def _note(self, tokens: np.ndarray, store: int) -> None:
        """What is cached of these tokens was offered."""
        self._pool.allocator.offered_to[self._pool.index.peek(tokens).blocks] = store

    def _next(self, now_ns: int) -> None:
        """The next prefix leaves. That is no use of it: its order of eviction stays."""
        here = self._those_here()
        if not here:
            self._waiting.clear()
        elif self._ticket is None and (prefix := self._next_waiting() or self._next_out()) is not None:
            self._sent, blocks = prefix
            self._sent_to = self._place(self._sent, blocks, here)
            self._ticket = self._transfers.start(self._sent_to, self._sent, blocks, _OPTIONS, _WORD, now_ns)

    def _those_here(self) -> list[int]:
        """The stores that are there. What others had been offered was offered to nobody."""
        here = [store for store in self._stores if self._transfers.knows(store)]
        if len(here) < len(self._stores):
            offered_to = self._pool.allocator.offered_to
            offered_to[~np.isin(offered_to, here)] = NOBODY
        return here

    def _place(self, tokens: np.ndarray, blocks: np.ndarray, here: Sequence[int]) -> int:
        """The store that a prefix goes to. here: those that are there, ascending."""
        if len(here) == 1:
            return here[0]
        offered_to = self._pool.allocator.offered_to[blocks].astype(np.int64)
        rows = np.where(offered_to == NOBODY, -1, np.searchsorted(here, offered_to))
        row = self._policy.place(tokens, rows, np.array(here, dtype=np.int64))
        return here[given_int(self._policy, "place", row, 0, len(here) - 1, unit="a row of the stores")]

    def _next_waiting(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The first that waits, as far as it is still here and is to be offered: tokens, int32, and blocks, int32."""
        self._is_leaving = False
        while self._waiting:
            tokens = self._waiting.popleft()
            found = self._pool.index.peek(tokens)
            self._num_too_late += len(tokens) - found.num_tokens
            if found.num_tokens and (self._policy.renews or self._is_new(found.blocks)):
                return tokens[: found.num_tokens], found.blocks
        return None

    def _next_out(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What would be evicted first of all that was not offered, while it is near: tokens, int32, blocks, int32.

        Evicted is what leaves the instance: while DRAM has free blocks, what is in HBM goes there.
        """
        self._is_leaving = True
        allocator = self._pool.allocator
        num_short = self._num_ahead - allocator.num_free - allocator.num_free_dram
        return self._pool.index.next_out(num_short, allocator.offered_to != NOBODY) if num_short > 0 else None

    def _is_new(self, blocks: np.ndarray) -> bool:
        """Whether the last of them, and so something, was not offered yet."""
        return bool(self._pool.allocator.offered_to[blocks[-1]] == NOBODY)
