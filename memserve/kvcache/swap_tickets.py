"""Swap tickets: Table 1's swap_out and swap_in as their callers see them. Knows addresses; swaps.py knows what moves.

A ticket is DONE when it is returned where copies are done at once. Else it is OPEN: the blocks at both of its ends are
held by ("swap", n), the old addresses are good, and `MemPool.poll` returns it when it has ended. It FAILED if its copy
did, which whoever notices the end is told by what the copy raised: nothing has moved.
"""

from collections.abc import Callable

import numpy as np

from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.allocator import Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import NotHeld
from memserve.kvcache.swaps import Swap
from memserve.kvcache.ticket import Ticket, TicketState


class SwapTickets:
    """The swaps of one pool."""

    def __init__(self, blocks: BlockPool, book: AddressBook) -> None:
        self._blocks, self._book = blocks, book
        self._ended: list[Ticket] = []

    def swap_out(self, num_blocks: int) -> Ticket:
        """As MemPool's."""
        swap, ticket = self._blocks.swap_out(num_blocks), self._new()

        def end() -> None:
            ticket.addrs, ticket.reason = self._book.addresses(swap.arrived), swap.failed
            ticket.state = TicketState.FAILED if swap.failed else TicketState.DONE

        self._ends_with(swap, ticket, end)
        return ticket

    def swap_in(self, blocks: np.ndarray, holder: Holder) -> Ticket:
        """As MemPool's, of block numbers (int32 [n]). Raises as it does."""
        if not np.isin(blocks, self._blocks.allocator.held_by(holder)).all():
            raise NotHeld(f"{holder} swaps in blocks that it does not hold")
        if len(np.unique(blocks)) != len(blocks):
            raise ValueError(f"{holder} swaps in blocks {blocks.tolist()}: expected each once")
        if self._blocks.swap_in_of(blocks) is not None:
            raise ValueError(f"{holder} swaps in blocks {blocks.tolist()}: some of them are on their way already")
        swap, ticket, before = self._blocks.swap_in(blocks, holder), self._new(), self._book.addresses(blocks)

        def end() -> None:
            here = swap.replaced(blocks)
            held = np.isin(here, self._blocks.allocator.held_by(holder))
            held &= (here != blocks) | (self._book.addresses(here) == before)  # not given up, and its number had anew
            ticket.addrs, ticket.reason = self._book.addresses(here[held]), swap.failed
            if not held.all():
                ticket.reason = ticket.reason or f"{holder} gave up blocks before they were here"
            ticket.state = TicketState.FAILED if ticket.reason else TicketState.DONE

        self._ends_with(swap, ticket, end)
        return ticket

    def drain_ended(self) -> list[Ticket]:
        """Tickets that were OPEN when they were returned, and have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _new(self) -> Ticket:
        return Ticket(self._book.new_ticket_id(), np.empty(0, dtype=np.int64))

    def _ends_with(self, swap: Swap, ticket: Ticket, end: Callable[[], None]) -> None:
        """Ends the ticket when its swap does: addresses are good at that moment, and may be stale soon after."""
        if swap.has_ended:
            end()
            return

        def later() -> None:
            end()
            self._ended.append(ticket)

        swap.then = later
