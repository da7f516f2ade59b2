"""Transfers: one pool's end of the transfer protocol (section 4.3): what it sends and what it receives.

Sans-IO: time and messages come in, messages are left in an outbox. A message that is lost is asked for again, and one
that comes twice changes nothing. Knows no request; whoever called is told by tickets, whoever receives by arrivals.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from memserve.clock import earliest
from memserve.kvcache.address import Medium, incarnation_of
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.allocator import Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.granularity import Granularity
from memserve.kvcache.incoming import Incoming
from memserve.kvcache.inputs import medium_of, named
from memserve.kvcache.outgoing import Outgoing
from memserve.kvcache.protocol import ReceiverEvent, ReceiverState, SenderEvent, SenderState
from memserve.kvcache.receiving import Receiving
from memserve.kvcache.reservations import ReservationMessage, Reservations
from memserve.kvcache.sending import Sending
from memserve.kvcache.ticket import Arrival, GrantLimits, Sent, Ticket, Timeouts, TransferCounts, TransferOptions
from memserve.messages import Ask, PoolMessage, PoolSize, Refuse, pack_times, pack_tokens
from memserve.transfer.transport import Arrived, Transport

_FROM_SENDER = ("Ask", "Done", "AbortAck")


class Transfers:
    """One instance's tickets. Joins the pools that `transport` connects, under the book's incarnation.

    memories: of HBM and of DRAM; None where nothing is stored.  granularity: made for the shape of the pool, which
    peers must share.  limits: to what is granted here.
    """

    def __init__(
        self,
        pool: BlockPool,
        book: AddressBook,
        transport: Transport,
        memories: Sequence[torch.Tensor | None],
        granularity: Granularity,
        timeouts: Timeouts,
        limits: GrantLimits = GrantLimits(),  # noqa: B008  # frozen: no call can change it
    ) -> None:
        for value, kind in ((transport, Transport), (timeouts, Timeouts)):
            if not isinstance(value, kind):
                raise ValueError(f"{kind.__name__.lower()}={value!r}: expected a {kind.__name__}")
        self.geometry, self.granularity = granularity.wire_geometry, granularity
        self._pool, self._book, self._transport = pool, book, transport
        self._outbox: list[tuple[int, PoolMessage]] = []
        self._sending = Sending(pool, transport, granularity, timeouts, self._send)
        size = PoolSize(pool.allocator.num_blocks, pool.allocator.num_dram_blocks, granularity.num_ranks)
        self._reservations = Reservations(pool, size, book, self.geometry, timeouts, self._send)
        self._receiving = Receiving(pool, size, book, self.geometry, timeouts, limits, self._reservations, self._send)
        self._gone: set[int] = set()
        pool.followers.append(self._follow)
        transport.attach(book.incarnation, memories)

    def order_by(self, level_of: Callable[[bytes], float]) -> None:
        """Of those who wait for room here, the ones whose `private` has a smaller level get it first."""
        self._receiving.level_of = level_of

    @property
    def incarnation(self) -> int:
        return self._book.incarnation

    @property
    def counts(self) -> TransferCounts:
        """What this pool has sent."""
        return sum(self.counts_by_peer.values(), TransferCounts())

    @property
    def counts_by_peer(self) -> Mapping[int, TransferCounts]:
        """What it has sent to each other instance."""
        return self._sending.counts_by_peer

    @property
    def num_open(self) -> int:
        """Tickets of either side that still hold blocks or wait for an outcome, and answers to reservations."""
        return len(self._sending.tickets) + len(self._receiving.tickets) + self._reservations.num_open

    @property
    def has_waiting(self) -> bool:
        """Whether senders wait for room here, which `poll` grants as soon as there is some."""
        return self._receiving.has_waiting

    @property
    def open_asks(self) -> list[Ask]:
        """Of the tickets under which others write here."""
        return [incoming.ask for incoming in self._receiving.tickets.values()]

    @property
    def num_quarantined(self) -> int:
        """Blocks of failed tickets under which something may still be read or written."""
        failed = [o.blocks for o in self._sending.tickets.values() if o.state is SenderState.DRAINING]
        failed += [i.blocks for i in self._receiving.tickets.values() if i.state is ReceiverState.QUARANTINED]
        return sum(map(len, failed))

    def start(
        self,
        peer: int,
        tokens: np.ndarray,
        blocks: np.ndarray,
        options: TransferOptions,
        private: bytes,
        now_ns: int,
        *,
        ready: bool = True,
        told: bool = True,
        addrs: np.ndarray | None = None,
    ) -> Ticket:
        """Asks `peer` for room for the KV of `tokens` (int32 [n]) in `blocks` (int32, all that hold it, in order).

        ready: the blocks are final; else `mark_ready` says when.  told: `private` says all; else `Done` waits until
        `tell` does.  addrs: where they go, int64 [n] reserved before: no grant is waited for. Raises ValueError for a
        transfer to itself and for a number of blocks that does not fit the tokens, StaleAddress for addresses that are
        not reserved, ValueError for those that were inserted before or that another ticket still writes to.
        """
        needed = self._pool.blocks_for(len(tokens))
        if peer == self.incarnation:
            raise ValueError(f"transfer to instance {peer}: expected another instance")
        if not needed or len(blocks) != needed:
            raise ValueError(f"{len(blocks)} blocks for {len(tokens)} tokens: expected {needed}, at least 1")
        if len(set(blocks.tolist())) != len(blocks):  # np.unique takes five times as long
            raise ValueError(f"src blocks {blocks.tolist()}: expected each once")
        medium_of(options.medium)
        if not isinstance(private, bytes):
            raise ValueError(f"private={private!r}: expected bytes")
        if not options.on_demand and addrs is None:
            raise ValueError("dst_addrs=None: expected addresses, or flags.on_demand")
        if addrs is not None and len(addrs) != needed:
            raise ValueError(f"{len(addrs)} dst_addrs for {needed} blocks: expected one each")
        target = None if addrs is None else self._reservations.pool_of(peer, addrs)
        if addrs is not None and self._sending.is_writing_to(peer, addrs):
            raise ValueError(f"dst_addrs on instance {peer}: a transfer that has not ended writes there")
        ask = Ask(
            self._book.new_ticket_id(), pack_tokens(tokens), needed, int(options.medium), options.insert,
            options.best_effort, options.pinned, private, self.geometry, b"" if addrs is None else pack_times(addrs),
        )  # fmt: skip
        layers = self.geometry.num_layers
        ticket = self._sending.start(peer, ask, blocks, layers, now_ns, ready=ready, told=told, target_pool=target)
        if addrs is not None and options.insert:
            self._reservations.note_inserted(peer, addrs)
        if peer in self._gone:
            self._sending.peer_gone(peer, now_ns)
        return ticket

    def knows(self, instance: int) -> bool:
        """Whether the transport connects this pool with an instance that is not known to be gone."""
        return self._transport.knows(instance) and instance not in self._gone

    def reserve(self, peer: int, num_blocks: int, medium: Medium, holder: Holder, now_ns: int) -> Ticket:
        """Asks `peer` for blocks in its pool, to be written later. The ticket's addrs say where, once it is DONE."""
        ticket = self._reservations.reserve(peer, self._book.new_ticket_id(), num_blocks, medium, holder, now_ns)
        if peer in self._gone:
            self._reservations.peer_gone(peer)
        return ticket

    def free_reserved(self, addrs: np.ndarray, holder: Holder, now_ns: int) -> None:
        """Gives up addresses of another instance. Raises StaleAddress for any that `holder` has not reserved, and
        ValueError while a transfer writes there.
        """
        self._reservations.check_owned(addrs, holder)
        peer = int(incarnation_of(addrs[:1])[0])
        if self._sending.is_writing_to(peer, addrs):
            raise ValueError(f"addresses on instance {peer}: a transfer that has not ended writes there")
        self._reservations.free(addrs, holder, now_ns)

    def mark_ready(self, ticket: Ticket, num_blocks: int, layers_ns: Mapping[int, int]) -> None:
        """The ticket's first `num_blocks` blocks are final in these layers, since when each."""
        self._sending.mark_ready(ticket.ticket_id, num_blocks, layers_ns)

    def is_granted(self, ticket: Ticket) -> bool:
        """Whether the receiver has made room."""
        out = self._sending.tickets.get(ticket.ticket_id)
        return out is not None and out.state is not SenderState.ASKED

    def cancel(self, ticket: Ticket, reason: str, now_ns: int) -> None:
        """Ends a ticket's outcome now, as its deadline would; nothing if it has ended."""
        out = self._sending.tickets.get(ticket.ticket_id)
        if out is not None and not ticket.ended:
            self._sending.event(out, SenderEvent.DEADLINE, now_ns, reason)

    def tell(self, ticket: Ticket, private: bytes) -> None:
        """What the receiver is to be told with `Done`, instead of what the Ask carried."""
        self._sending.tell(ticket.ticket_id, private)

    def keep_paths(self, blocks: np.ndarray, holder: Holder) -> None:
        """`holder` is about to give up `blocks` (int32 [n]) and whatever else it has, or may do so at any time. Tickets
        that still send any of these hold from now on what lies above them in the index, where somebody else was the
        first to cache it.
        """
        if len(self._pool.allocator.held_by(holder)) > len(blocks):
            self._sending.keep_paths(blocks)

    def _follow(self, old: np.ndarray, new: np.ndarray) -> None:
        """The index has blocks `new` for `old`. Tickets that hold one of these hold the new one too, or what lies above
        a block that they use could be evicted as soon as its mover lets go.
        """
        outgoing, incoming = self._sending.tickets.values(), self._receiving.tickets.values()
        for holder in (*(out.holder for out in outgoing), *(one.holder for one in incoming)):
            self._pool.hold(new[np.isin(old, self._pool.allocator.held_by(holder))], holder)

    def settle(self, arrival: Arrival, heir: Holder | None = None) -> None:
        """Gives up the ticket's hold on what arrived, unless the sender asked for it to stay (`pinned`).

        heir: takes over everything that the ticket holds, first.
        """
        self._receiving.settle(arrival, None if heir is None else named(heir))

    def keeps(self, holder: Holder) -> bool:
        """Whether this is a settled ticket whose blocks stay here, since its sender asked for that (`pinned`)."""
        ticket_id, held = holder[1:], self._pool.allocator.named_holders()
        is_open = ticket_id in self._sending.tickets or ticket_id in self._receiving.tickets
        return holder[0] == "transfer" and holder in held and not is_open

    def receive(self, sender: int, message: PoolMessage, now_ns: int) -> None:
        """Takes one message of another pool, `sender` its incarnation. What a dead one said last comes too late."""
        if sender in self._gone:
            return
        if isinstance(message, ReservationMessage) or (
            isinstance(message, Refuse) and self._reservations.is_mine(message)
        ):
            self._reservations.receive(sender, message, now_ns)
        elif type(message).__name__ in _FROM_SENDER or message.ticket[0] != self.incarnation:
            self._receiving.receive(message, now_ns)
        else:
            self._sending.receive(sender, message, now_ns)

    def has_room_beside(self, ask: Ask) -> bool:
        """Whether an Ask that would be declined for want of room can be granted in the middle of a step: what is free,
        or cached and used by nobody, is enough, and nothing has to be moved to DRAM for it.
        """
        return ask.best_effort and ask.medium == Medium.HBM and ask.num_blocks <= self._pool.num_unmoved

    def is_new(self, ask: Ask) -> bool:
        """Whether an Ask is no repeat, and its ticket has not ended."""
        return self._receiving.is_new(ask)

    def poll(self, now_ns: int) -> list[Ticket]:
        """Lets time pass: moves that arrived, deadlines, repeats, waiting Asks. Returns the tickets that have ended."""
        self.hear_moves(now_ns)
        self._sending.let_time_pass(now_ns)
        self._receiving.let_time_pass(now_ns)
        self._reservations.let_time_pass(now_ns)
        return self._sending.drain_ended() + self._reservations.drain_ended()

    def wants(self, arrived: Arrived) -> bool:
        """Whether the end of a move is to be told at once; else with the next `poll`."""
        return self._sending.wants(arrived)

    def hear_moves(self, now_ns: int) -> None:
        """Only the moves that have arrived: what is sent whole is told to its receiver."""
        for arrived in self._transport.poll(self.incarnation, now_ns):
            self._sending.arrived(arrived, now_ns)

    def peer_gone(self, incarnation: int, now_ns: int) -> None:
        """There is proof that an instance's process is gone: it neither writes nor answers any more, nor reads."""
        self._gone.add(incarnation)
        self._outbox = [said for said in self._outbox if said[0] != incarnation]
        self._sending.peer_gone(incarnation, now_ns)
        for incoming in [i for i in self._receiving.tickets.values() if i.ask.ticket[0] == incarnation]:
            self._receiving.event(incoming, ReceiverEvent.PEER_GONE, now_ns)
        self._reservations.peer_gone(incarnation)

    def drain_arrivals(self) -> list[Arrival]:
        """What has arrived since the last call; each is held until `settle`."""
        return self._receiving.drain_arrivals()

    def drain_sent(self) -> list[Sent]:
        """What this pool has sent whose ticket has ended since the last call, in order of their ends."""
        return self._sending.drain_sent()

    def drain_outbox(self) -> list[tuple[int, PoolMessage]]:
        """(incarnation, message) pairs to deliver."""
        out, self._outbox = self._outbox, []
        return out

    def next_time_ns(self) -> int | None:
        """When `poll` has something to do because of time alone; None when never."""
        return earliest(self._sending.next_time_ns(), self._receiving.next_time_ns(), self._reservations.next_time_ns())

    def check(self) -> None:
        """Raises unless every ticket holds its blocks."""
        entries: list[Outgoing | Incoming] = [*self._sending.tickets.values(), *self._receiving.tickets.values()]
        for entry in entries:
            if not isinstance(entry, Incoming) or entry.state is not ReceiverState.WAITING:
                held = Counter(self._pool.allocator.held_by(entry.holder).tolist())
                assert not Counter(entry.blocks.tolist()) - held, f"{entry.holder} lost blocks"

    def _send(self, peer: int, message: PoolMessage) -> None:
        if peer not in self._gone:
            self._outbox.append((peer, message))
