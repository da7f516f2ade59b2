"""Reservations: blocks that one pool allocates in another's memory (`alloc_mem` with an instance; section 4.1).

    owner  Reserve -> Reserved: ticket DONE, its addresses are the owner's until it frees them -> Release -> Released
    host   the blocks are held by ("remote", owner's incarnation, n); freed by Release, or when the owner is gone

Sans-IO. A message that is not answered is repeated; a repeat, or one that was overtaken, changes nothing and leaks
nothing: what a host grants to nobody who waits is given back.
"""

from dataclasses import dataclass, field

import numpy as np

from memserve.clock import to_s
from memserve.kvcache.address import Medium, incarnation_of
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.allocator import Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import OutOfBlocks, StaleAddress
from memserve.kvcache.sending import Send
from memserve.kvcache.ticket import Ticket, TicketState, Timeouts
from memserve.latest import Latest
from memserve.messages import Geometry, PoolSize, Refuse, Release, Released, Reserve, Reserved, pack_times, unpack_times

TicketId = tuple[int, int]
ReservationMessage = Reserve | Reserved | Release | Released
NUM_REMEMBERED = 4096  # reservations that were refused or given up, in case they are asked for again
_NO_ADDRS = np.empty(0, dtype=np.int64)


@dataclass
class _Wanted:
    """A reservation that was asked for."""

    ticket: Ticket
    host: int
    message: Reserve
    holder: Holder
    deadline_ns: int
    retry_ns: int


@dataclass
class _Owned:
    """What is left of a reservation here. pool: the host's.

    inserted: addresses, int64 [n], that the host's index may have by now: nothing may be written there any more.
    """

    host: int
    holder: Holder
    addrs: np.ndarray
    pool: PoolSize
    inserted: np.ndarray = field(default_factory=lambda: _NO_ADDRS)


@dataclass
class _Freed:
    """Addresses that the host has not confirmed yet to have freed; all: of the whole reservation."""

    host: int
    addrs: np.ndarray
    all: bool
    retry_ns: int


def difference_of(theirs: Geometry, ours: Geometry) -> str:
    """The first thing in which a sender's blocks differ from a receiver's, named with both values; "" if none."""
    for name in ours.__struct_fields__:
        if getattr(theirs, name) != getattr(ours, name):
            return f"{name}={getattr(theirs, name)!r}: the receiver has {name}={getattr(ours, name)!r}"
    return ""


class Reservations:
    """Both sides of one pool. size: what the others are told of it.  send: takes (incarnation, message)."""

    def __init__(
        self, pool: BlockPool, size: PoolSize, book: AddressBook, geometry: Geometry, timeouts: Timeouts, send: Send
    ) -> None:
        self._size, self._geometry = size, geometry
        self._pool, self._book, self._timeouts, self._send = pool, book, timeouts, send
        self._wanted: dict[TicketId, _Wanted] = {}
        self._owned: dict[TicketId, _Owned] = {}
        self._freed: dict[TicketId, _Freed] = {}
        self._hosted: dict[TicketId, bytes] = {}  # answered with these addresses
        self._over: Latest[TicketId, None] = Latest(NUM_REMEMBERED)
        self._ended: list[Ticket] = []

    @property
    def num_open(self) -> int:
        """Answers that are waited for."""
        return len(self._wanted) + len(self._freed)

    def reserve(
        self, host: int, ticket_id: TicketId, num_blocks: int, medium: Medium, holder: Holder, now_ns: int
    ) -> Ticket:
        """Asks `host` for blocks; for none nobody is asked. The ticket's addrs are their addresses once it is DONE."""
        ticket, message = Ticket(ticket_id, _NO_ADDRS), Reserve(ticket_id, num_blocks, int(medium), self._geometry)
        if not num_blocks:
            ticket.state = TicketState.DONE
            self._ended.append(ticket)
            return ticket
        deadline_ns, retry_ns = now_ns + self._timeouts.patience_ns, now_ns + self._timeouts.retry_ns
        self._wanted[ticket_id] = _Wanted(ticket, host, message, holder, deadline_ns, retry_ns)
        self._send(host, message)
        return ticket

    def pool_of(self, host: int, addrs: np.ndarray) -> PoolSize:
        """The size of the host's pool, if this pool has reserved all of `addrs` (int64 [n]) there.

        Raises StaleAddress for any that it has not, or has freed; ValueError for any that was inserted there: the
        host's index may answer with it, and a second write would change what other requests read.
        """
        found = self._owning(host, addrs)
        known = np.concatenate([owned.addrs for owned in found]) if found else _NO_ADDRS
        if not len(addrs) or not np.isin(addrs, known).all() or len(np.unique(addrs)) != len(addrs):
            raise StaleAddress(f"addresses on instance {host}: expected each once, and reserved by alloc_mem from here")
        if any(np.isin(owned.inserted, addrs).any() for owned in found):
            raise ValueError(f"dst_addrs on instance {host}: expected none that a transfer_with_insert has gone to")
        return found[0].pool

    def note_inserted(self, host: int, addrs: np.ndarray) -> None:
        """The host's index may have `addrs` (int64 [n]) from now on."""
        for owned in self._owning(host, addrs):
            owned.inserted = np.union1d(owned.inserted, addrs[np.isin(addrs, owned.addrs)])

    def _owning(self, host: int, addrs: np.ndarray) -> list[_Owned]:
        return [owned for owned in self._owned.values() if owned.host == host and np.isin(owned.addrs, addrs).any()]

    def check_owned(self, addrs: np.ndarray, holder: Holder) -> None:
        """Raises StaleAddress unless `holder` has reserved all of `addrs` (int64 [n]), each given once."""
        mine = [owned.addrs for owned in self._owned.values() if owned.holder == holder]
        if not np.isin(addrs, np.concatenate([_NO_ADDRS, *mine])).all() or len(np.unique(addrs)) != len(addrs):
            host = incarnation_of(addrs[:1])[0]
            raise StaleAddress(f"addresses on instance {host}: expected each once, and reserved by {holder}")

    def free(self, addrs: np.ndarray, holder: Holder, now_ns: int) -> None:
        """Gives up addresses (int64 [n]) that `holder` has reserved (`check_owned`)."""
        mine = {key: owned for key, owned in self._owned.items() if owned.holder == holder}
        for ticket_id, owned in mine.items():
            gone = np.isin(owned.addrs, addrs)
            if gone.any():
                self._free(ticket_id, owned.host, owned.addrs[gone], now_ns)
                owned.addrs = owned.addrs[~gone]
                if not len(owned.addrs):
                    del self._owned[ticket_id]

    def blocks_of(self, owner: int, addrs: np.ndarray) -> np.ndarray | None:
        """Block numbers, int32 [n], of addresses here that `owner` has reserved; None if any is not its own."""
        try:
            blocks = self._book.resolve(addrs)
        except StaleAddress:
            return None
        held = [self._pool.allocator.held_by(_holder(key)) for key in self._hosted if key[0] == owner]
        return blocks if held and np.isin(blocks, np.concatenate(held)).all() else None

    def receive(self, sender: int, message: ReservationMessage | Refuse, now_ns: int) -> None:
        """Takes a message of the other side."""
        match message:
            case Reserve():
                self._host(message)
            case Release():
                self._give_up(message)
            case Reserved():
                self._granted(sender, message, now_ns)
            case Refuse():
                self._end(message.ticket, message.reason, refused=True)
            case Released():
                self._confirmed(message)

    def is_mine(self, message: Refuse) -> bool:
        """Whether a refusal is of a reservation."""
        return message.ticket in self._wanted

    def let_time_pass(self, now_ns: int) -> None:
        """Gives up what nobody has granted in time; asks again for answers that are missing."""
        for ticket_id, wanted in list(self._wanted.items()):
            if now_ns >= wanted.deadline_ns:
                patience_s = to_s(self._timeouts.patience_ns)
                self._end(ticket_id, f"no answer to the reservation within its patience, {patience_s:g} s")
                self._free(ticket_id, wanted.host, _NO_ADDRS, now_ns, everything=True)
            elif now_ns >= wanted.retry_ns:
                wanted.retry_ns = now_ns + self._timeouts.retry_ns
                self._send(wanted.host, wanted.message)
        for ticket_id, freed in self._freed.items():
            if now_ns >= freed.retry_ns:
                freed.retry_ns = now_ns + self._timeouts.retry_ns
                self._send(freed.host, Release(ticket_id, pack_times(freed.addrs), freed.all))

    def next_time_ns(self) -> int | None:
        """When `let_time_pass` has something to do."""
        times = [min(w.deadline_ns, w.retry_ns) for w in self._wanted.values()]
        return min([*times, *(f.retry_ns for f in self._freed.values())], default=None)

    def peer_gone(self, incarnation: int) -> None:
        """An instance is gone: what it had reserved here is free, and what this pool had there is no more."""
        for ticket_id in [key for key in self._hosted if key[0] == incarnation]:
            del self._hosted[ticket_id]
            self._pool.release_all(_holder(ticket_id))
        for ticket_id in [key for key, wanted in self._wanted.items() if wanted.host == incarnation]:
            self._end(ticket_id, f"instance {incarnation} is gone")
        self._owned = {key: owned for key, owned in self._owned.items() if owned.host != incarnation}
        self._freed = {key: freed for key, freed in self._freed.items() if freed.host != incarnation}

    def drain_ended(self) -> list[Ticket]:
        """Tickets whose outcome is known since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _host(self, message: Reserve) -> None:
        owner, ticket_id = message.ticket[0], message.ticket
        if ticket_id in self._over:
            self._send(owner, Refuse(ticket_id, "the reservation was refused or given up"))
            return
        if difference := difference_of(message.geometry, self._geometry):
            self._send(owner, Refuse(ticket_id, difference))
            return
        if ticket_id not in self._hosted:
            try:
                blocks = self._pool.alloc(message.num_blocks, _holder(ticket_id), Medium(message.medium))
            except OutOfBlocks as error:
                self._over[ticket_id] = None  # for its owner it has ended: a repeat is not to find room meanwhile
                self._send(owner, Refuse(ticket_id, str(error)))
                return
            self._hosted[ticket_id] = pack_times(self._book.addresses(blocks))
        self._send(owner, Reserved(ticket_id, self._hosted[ticket_id], self._size))

    def _give_up(self, message: Release) -> None:
        ticket_id, holder = message.ticket, _holder(message.ticket)
        held = self._pool.allocator.held_by(holder)
        named = np.isin(self._book.addresses(held), unpack_times(message.addrs))
        self._pool.release(held if message.all else held[named], holder)
        if message.all or named.all():
            self._hosted.pop(ticket_id, None)
            self._over[ticket_id] = None
        self._send(ticket_id[0], Released(ticket_id, message.addrs, message.all))

    def _granted(self, host: int, message: Reserved, now_ns: int) -> None:
        wanted, addrs = self._wanted.get(message.ticket), unpack_times(message.addrs)
        if wanted is not None:
            self._owned[message.ticket] = _Owned(host, wanted.holder, addrs, message.pool)
            self._end(message.ticket, "", addrs)
        elif message.ticket not in self._owned and message.ticket not in self._freed:
            self._free(message.ticket, host, _NO_ADDRS, now_ns, everything=True)

    def _confirmed(self, message: Released) -> None:
        freed = self._freed.get(message.ticket)
        if freed is None or (freed.all and not message.all):
            return
        freed.addrs = freed.addrs[~np.isin(freed.addrs, unpack_times(message.addrs))]
        if message.all or not len(freed.addrs):
            del self._freed[message.ticket]

    def _free(
        self, ticket_id: TicketId, host: int, addrs: np.ndarray, now_ns: int, *, everything: bool = False
    ) -> None:
        freed = self._freed.setdefault(ticket_id, _Freed(host, _NO_ADDRS, everything, 0))
        freed.addrs, freed.all = np.concatenate([freed.addrs, addrs]), freed.all or everything
        freed.retry_ns = now_ns + self._timeouts.retry_ns
        self._send(host, Release(ticket_id, pack_times(freed.addrs), freed.all))

    def _end(self, ticket_id: TicketId, reason: str, addrs: np.ndarray | None = None, refused: bool = False) -> None:
        ticket = self._wanted.pop(ticket_id).ticket
        ticket.state, ticket.reason, ticket.refused = TicketState.FAILED, reason, refused
        if addrs is not None:
            ticket.state, ticket.addrs = TicketState.DONE, addrs
        self._ended.append(ticket)


def _holder(ticket_id: TicketId) -> Holder:
    return ("remote", *ticket_id)
