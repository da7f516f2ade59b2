"""Bequest: what an instance that leaves has cached goes to another (`heir=`). Sans-IO; decides nothing of who gets it.

    begin -> the prefixes that would have been evicted last, each by a best-effort transfer_with_insert
          -> DONE: the next one
          -> FAILED: nothing more is offered to that heir before the next `begin`

The heir takes what it lacks into blocks that are free, or of which its index lets go. A prefix that was given is not
offered to the same heir again, so that `begin` may be called while requests go on here, and once more at their end.
Another heir is offered everything, once what is on its way to the one before has ended, however it ends.
"""

from collections import deque

import msgspec
import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.ticket import Ticket, TicketState, TransferOptions
from memserve.kvcache.transfers import Transfers


class Bequeathed(msgspec.Struct, frozen=True, tag=True):
    """KV that its holder leaves to the receiver."""


_WORD, _OPTIONS = msgspec.msgpack.encode(Bequeathed()), TransferOptions(insert=True, best_effort=True)


class Bequest:
    """One instance's. num_tokens: given so far, without what heirs had.  num_declined: prefixes that found no taker, of
    those that the latest `begin` offers.
    """

    def __init__(self, transfers: Transfers, pool: BlockPool) -> None:
        self.num_tokens = self.num_declined = 0
        self._transfers, self._pool = transfers, pool
        self._heir: int | None = None
        self._num_left = 0  # blocks that this heir is still offered
        self._waiting: deque[np.ndarray] = deque()
        self._given: set[bytes] = set()
        self._ticket: Ticket | None = None
        self._offered: tuple[int, bytes] = (-1, b"")  # the ticket's heir and tokens

    def begin(self, heir: int, share: float, now_ns: int) -> None:
        """Offers what is cached here to `heir`, an incarnation: in all calls at most that share of the pool's blocks.

        A prefix is given whole, so that the last one may exceed it. What an earlier call still had to offer is offered
        by this one.
        """
        if heir != self._heir:
            self._heir, self._num_left = heir, int(share * self._pool.num_blocks)
            self._given.clear()
        self.num_declined = 0
        self._waiting = deque(tokens for tokens, _ in self._pool.index.iter_prefixes())
        self._next(now_ns)

    def ended(self, ticket: Ticket, now_ns: int) -> None:
        """A transfer of this instance has ended."""
        if ticket is not self._ticket:
            return
        self._ticket, (heir, sent) = None, self._offered
        if ticket.state is TicketState.DONE:
            self.num_tokens += len(ticket.addrs) * self._pool.block_size
        if heir == self._heir and ticket.state is TicketState.DONE:
            self._num_left -= len(ticket.addrs)
            self._given.add(sent)
        elif heir == self._heir:
            self.num_declined = 1 + len(self._waiting)
            self._waiting.clear()
        self._next(now_ns)

    def _next(self, now_ns: int) -> None:
        """The next prefix leaves, as far as it is still here, unless the heir has been offered enough."""
        assert self._heir is not None, "somebody gets it"
        while self._waiting and self._ticket is None:
            found = self._pool.match(tokens := self._waiting.popleft())
            sent = tokens[: found.num_tokens]
            if self._num_left <= 0:
                self._waiting.clear()
            elif len(sent) and sent.tobytes() not in self._given:
                self._offered = self._heir, sent.tobytes()
                self._ticket = self._transfers.start(self._heir, sent, found.blocks, _OPTIONS, _WORD, now_ns)
