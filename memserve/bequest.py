"""Bequest: what an instance that leaves has cached goes to another (`heir=`). Sans-IO; decides nothing of who gets it.

    begin -> of the prefixes that would have been evicted last, as many as the heir is offered, one after the other, the
             one that goes last at the end: each by a best-effort transfer_with_insert
          -> DONE, or declined for want of room: the next one
          -> FAILED otherwise: nothing more is offered to that heir before the next `begin`

The heir takes what it lacks into blocks that are free, or of which its index lets go, and keeps longest what came last.
A prefix that was given is not offered to the same heir again, so that `begin` may be called while requests go on here,
and once more at their end. Another heir is offered everything, once what is on its way to the one before has ended.
"""

from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.ticket import Ticket, TicketState, TransferOptions
from memserve.kvcache.transfers import Transfers


class Bequeathed(msgspec.Struct, frozen=True, tag=True):
    """KV that its holder leaves to the receiver."""


_WORD, _OPTIONS = msgspec.msgpack.encode(Bequeathed()), TransferOptions(insert=True, best_effort=True)


@dataclass(frozen=True)
class _Offer:
    """A prefix on its way. blocks: int32 [n], here."""

    ticket: Ticket
    heir: int
    tokens: bytes
    blocks: np.ndarray


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
        self._given: set[bytes] = set()  # prefixes, to this heir
        self._given_blocks: set[int] = set()  # where they lay
        self._offer: _Offer | None = None

    def begin(self, heir: int, share: float, now_ns: int) -> None:
        """Offers what is cached here to `heir`, an incarnation: in all calls at most that share of the pool's blocks.

        A prefix is given whole, so that one may exceed it. What an earlier call still had to offer is offered by this
        one.
        """
        if heir != self._heir:
            self._heir, self._num_left = heir, int(share * self._pool.num_blocks)
            self._given, self._given_blocks = set(), set()
        self.num_declined = 0
        self._waiting = self._chosen()
        self._next(now_ns)

    def ended(self, ticket: Ticket, now_ns: int) -> None:
        """A transfer of this instance has ended."""
        if (offer := self._offer) is None or ticket is not offer.ticket:
            return
        self._offer, is_done = None, ticket.state is TicketState.DONE
        if is_done:
            self.num_tokens += len(ticket.addrs) * self._pool.block_size
        if offer.heir == self._heir:
            self._took(offer) if is_done else self._declined(ticket)
        self._next(now_ns)

    def _took(self, offer: _Offer) -> None:
        self._num_left -= len(offer.ticket.addrs)
        self._given.add(offer.tokens)
        self._given_blocks.update(offer.blocks.tolist())

    def _declined(self, ticket: Ticket) -> None:
        self.num_declined += 1
        if not ticket.refused:
            self.num_declined += len(self._waiting)
            self._waiting.clear()

    def _chosen(self) -> deque[np.ndarray]:
        """What the heir is offered: the prefix that would go last comes last."""
        chosen, known, num_left = deque[np.ndarray](), set(self._given_blocks), self._num_left
        for tokens, blocks in self._pool.index.iter_prefixes():
            if num_left <= 0:
                break
            if tokens.tobytes() not in self._given:
                new = set(blocks.tolist()) - known
                num_left -= len(new)
                known |= new
                chosen.appendleft(tokens)
        return chosen

    def _next(self, now_ns: int) -> None:
        """The next prefix leaves, as far as it is still here."""
        assert self._heir is not None, "somebody gets it"
        while self._waiting and self._offer is None:
            found = self._pool.index.peek(tokens := self._waiting.popleft())
            sent = tokens[: found.num_tokens]
            self._pool.index.insert(sent, found.blocks)  # the youngest now, but used by nobody
            if len(sent) and sent.tobytes() not in self._given:
                ticket = self._transfers.start(self._heir, sent, found.blocks, _OPTIONS, _WORD, now_ns)
                self._offer = _Offer(ticket, self._heir, sent.tobytes(), found.blocks.copy())
