"""Receiving: the tickets under which others write into one pool. Performs the receiver's half of protocol.py.

    Ask -> the held prefix is retained, the rest allocated -> Grant .. Done -> published -> Arrival .. settle

The blocks are held by ("transfer", sender's incarnation, n) from the grant until the arrival is settled; of a ticket
that has failed by ("quarantine", sender's incarnation, n), until the sender is known to have stopped writing.
"""

from collections.abc import Callable

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.address_book import AddressBook
from memserve.kvcache.alarms import Alarms
from memserve.kvcache.allocator import Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import OutOfBlocks
from memserve.kvcache.incoming import NEVER_NS, Incoming, TicketId
from memserve.kvcache.protocol import Action, ReceiverEvent, ReceiverState, receiver_step
from memserve.kvcache.reservations import Reservations, difference_of
from memserve.kvcache.sending import BUSY, DECLINED, Send
from memserve.kvcache.ticket import Arrival, GrantLimits, Timeouts
from memserve.latest import Latest
from memserve.messages import (
    Abandon,
    Ask,
    Done,
    Geometry,
    Grant,
    Inserted,
    PoolMessage,
    PoolSize,
    Refuse,
    Wait,
    pack_times,
    unpack_times,
)

NUM_REMEMBERED = 4096  # ended tickets, so that a repeated message gets its answer again


class Receiving:
    """Incoming tickets of one pool. size: what senders are told of it.  limits: to what is granted."""

    def __init__(
        self,
        pool: BlockPool,
        size: PoolSize,
        book: AddressBook,
        geometry: Geometry,
        timeouts: Timeouts,
        limits: GrantLimits,
        reservations: Reservations,
        send: Send,
    ) -> None:
        self.tickets: dict[TicketId, Incoming] = {}
        self._pool, self._size, self._book, self._geometry = pool, size, book, geometry
        self._timeouts, self._limits, self._send = timeouts, limits, send
        self._reservations = reservations
        self.level_of: Callable[[bytes], float] = lambda private: 0  # of what an Ask that may wait carries
        self._num_asks = 0
        self._waiting: dict[TicketId, Incoming] = {}  # by levels, on each in the order in which they came
        self._alarms: Alarms[tuple[int, int, int]] = Alarms()  # by place and ticket
        self._over: Latest[TicketId, ReceiverState] = Latest(NUM_REMEMBERED)
        self._arrivals: list[Arrival] = []

    @property
    def has_waiting(self) -> bool:
        """Whether senders wait for room."""
        return bool(self._waiting)

    def receive(self, message: PoolMessage, now_ns: int) -> None:
        """Takes a message of a sender."""
        if isinstance(message, Ask):
            self._take_ask(message, now_ns)
            return
        incoming = self.tickets.get(message.ticket)
        event = ReceiverEvent(type(message).__name__)
        if incoming is not None:
            incoming.reason = message.reason if isinstance(message, Abandon) else ""
            if isinstance(message, Done):
                incoming.private, incoming.arrived_ns = message.private, message.arrived_ns
            self.event(incoming, event, now_ns)
        elif event is ReceiverEvent.DONE and self._over.get(message.ticket) is ReceiverState.DONE:
            self._send(message.ticket[0], Inserted(message.ticket))
        elif message.ticket not in self._over and receiver_step(ReceiverState.NONE, event)[0] is ReceiverState.ENDED:
            self._over[message.ticket] = ReceiverState.ENDED  # its Ask was overtaken, and is to get no room

    def is_new(self, ask: Ask) -> bool:
        """Whether it is no repeat, and its ticket has not ended."""
        return ask.ticket not in self.tickets and ask.ticket not in self._over

    def event(self, incoming: Incoming, event: ReceiverEvent, now_ns: int) -> None:
        """Steps the automaton."""
        incoming.state, actions = receiver_step(incoming.state, event)
        for action in actions:
            self._perform(incoming, action, now_ns)
        if incoming.state is ReceiverState.ENDED:
            self.tickets.pop(incoming.ask.ticket, None)
            self._over[incoming.ask.ticket] = ReceiverState.ENDED
        if incoming.state is ReceiverState.WAITING:
            self._wait(incoming)
        else:
            self._waiting.pop(incoming.ask.ticket, None)
        self._watch(incoming)

    def _wait(self, incoming: Incoming) -> None:
        last = next(reversed(self._waiting.values()), incoming)
        self._waiting[incoming.ask.ticket] = incoming
        if incoming.level < last.level:
            self._waiting = dict(sorted(self._waiting.items(), key=lambda item: item[1].level))

    def _watch(self, incoming: Incoming) -> None:
        self._alarms.put((incoming.place, *incoming.ask.ticket), incoming.next_time_ns)

    def let_time_pass(self, now_ns: int) -> None:
        """Ends outcomes whose deadline is over, reminds senders that are silent, and grants what fits by now."""
        for _, sender, number in self._alarms.due(now_ns):
            incoming = self.tickets[sender, number]
            if incoming.state is ReceiverState.QUARANTINED:
                incoming.deadline_ns = now_ns + self._timeouts.retry_ns
                self._send(sender, Abandon(incoming.ask.ticket, incoming.reason))
                self._watch(incoming)
            else:
                incoming.reason = "not all of the KV came within the deadline"
                self.event(incoming, ReceiverEvent.DEADLINE, now_ns)
        self.grant_waiting(now_ns)

    def grant_waiting(self, now_ns: int) -> None:
        """Grants waiting Asks in their order, as far as there is room."""
        while self._waiting:
            first = next(iter(self._waiting.values()))
            if not self._allocate(first):
                return
            self.event(first, ReceiverEvent.ROOM, now_ns)

    def next_time_ns(self) -> int | None:
        """When time alone does something to a ticket."""
        return self._alarms.next_ns()

    def settle(self, arrival: Arrival, heir: Holder | None) -> None:
        """Gives up the ticket's hold on what arrived, unless the sender asked for it to stay (`pinned`).

        heir: takes over everything that the ticket holds; of that it may hold some already. Raises ValueError for an
        arrival that was settled before.
        """
        if arrival.ticket_id not in self.tickets:
            raise ValueError(f"arrival of ticket {arrival.ticket_id}: expected one that was not settled before")
        incoming = self.tickets.pop(arrival.ticket_id)
        if heir is not None:
            self._pool.hold(self._pool.allocator.held_by(incoming.holder), heir)
        if not incoming.ask.pinned:
            self._pool.release_all(incoming.holder)
        self._over[arrival.ticket_id] = ReceiverState.DONE

    def drain_arrivals(self) -> list[Arrival]:
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def _take_ask(self, ask: Ask, now_ns: int) -> None:
        if ask.ticket in self.tickets:
            self.event(self.tickets[ask.ticket], ReceiverEvent.ASK_AGAIN, now_ns)
            return
        if ask.ticket in self._over:
            done = self._over[ask.ticket] is ReceiverState.DONE
            answer = Inserted(ask.ticket) if done else Refuse(ask.ticket, "the ticket has ended")
            self._send(ask.ticket[0], answer)
            return
        self._num_asks += 1
        never_waits = ask.best_effort or bool(ask.addrs)  # what is reserved needs no room
        level = 0 if never_waits else self.level_of(ask.private)
        incoming = Incoming(ask, self._num_asks, level, now_ns, reason=self._why_not(ask))
        first = next(iter(self._waiting.values()), None)
        in_turn = never_waits or first is None or level < first.level
        self.tickets[ask.ticket] = incoming  # before room is made: what it holds may move then, and is followed
        try:
            fits = not incoming.reason and in_turn and self._allocate(incoming)
        except BaseException:
            del self.tickets[ask.ticket]
            raise
        if fits:
            self.event(incoming, ReceiverEvent.ASK_FITS, now_ns)
        elif incoming.reason or ask.best_effort:
            incoming.reason = incoming.reason or f"{DECLINED}: no room for {ask.num_blocks} blocks"
            self.event(incoming, ReceiverEvent.ASK_REFUSED, now_ns)
        else:
            self.event(incoming, ReceiverEvent.ASK_WAITS, now_ns)

    def _why_not(self, ask: Ask) -> str:
        """Why an Ask is not granted here, whatever room there is, or ""."""
        if difference := difference_of(ask.geometry, self._geometry):
            return difference
        if ask.addrs and self._reservations.blocks_of(ask.ticket[0], unpack_times(ask.addrs)) is None:
            return "dst_addrs: not all of them are reserved by the sender"
        capacity = self._pool.allocator.num_dram_blocks if ask.medium == Medium.DRAM else self._pool.num_blocks
        if ask.num_blocks > capacity and not ask.addrs:
            return f"{ask.num_blocks} blocks: the receiver has {capacity} in {Medium(ask.medium).name}"
        return f"{BUSY}: {self._limits.max_best_effort} tickets are under way" if self._is_busy_for(ask) else ""

    def _is_busy_for(self, ask: Ask) -> bool:
        """Whether as many tickets are under way as may be for one at best effort."""
        most = self._limits.max_best_effort
        if most is None or not ask.best_effort:
            return False
        return sum(ticket.state is ReceiverState.GRANTED for ticket in self.tickets.values()) >= most

    def _allocate(self, incoming: Incoming) -> bool:
        """Retains the prefix that is held and allocates the rest; False, with nothing held, without room.

        Nothing is held either when making room raises what a copy failed with.
        """
        ask, pool = incoming.ask, self._pool
        reserved = self._reservations.blocks_of(ask.ticket[0], unpack_times(ask.addrs)) if ask.addrs else None
        if reserved is not None:
            pool.retain(reserved, incoming.holder)
            incoming.blocks = reserved
            return True
        held = np.empty(0, dtype=np.int32)
        if ask.insert:
            held = pool.index.peek(incoming.tokens).blocks
        pool.allocator.retain(held, incoming.holder)  # in the pool's peak once the rest is, too
        try:
            num_new = ask.num_blocks - len(held)
            if ask.medium == Medium.HBM and not ask.best_effort:
                self._keep_headroom(num_new, held)
            new = pool.alloc(num_new, incoming.holder, Medium(ask.medium))
        except Exception as error:
            pool.release_all(incoming.holder)
            if isinstance(error, OutOfBlocks):
                return False
            raise
        incoming.blocks = np.concatenate([held, new])
        incoming.num_held = len(held) * pool.block_size
        if ask.best_effort:  # it keeps its place; who uses it looks it up
            pool.index.insert(incoming.tokens[: incoming.num_held], held)
        else:
            pool.match(incoming.tokens, incoming.num_held)  # used now: an Ask that waits is looked at often
        return True

    def _keep_headroom(self, num_new: int, held: np.ndarray) -> None:
        """Raises OutOfBlocks if the running requests would be left with less than the headroom.

        held: the prefix, int32 [n], that the ticket holds by now, as nobody else but the index does where nothing runs.
        """
        pool, available = self._pool, self._pool.num_available
        is_ours = (held < pool.num_blocks) & (pool.allocator.refcounts[held] <= 3)
        idle = available + int(np.count_nonzero(is_ours)) >= pool.num_blocks
        if not idle and available - num_new < self._limits.headroom_blocks:
            raise OutOfBlocks(f"{num_new} blocks would leave less than {self._limits.headroom_blocks} of {available}")

    def _perform(self, incoming: Incoming, action: Action, now_ns: int) -> None:
        ticket_id = incoming.ask.ticket
        match action:
            case Action.ALLOCATE:  # done by whoever found that it fits
                incoming.granted_ns, incoming.deadline_ns = now_ns, now_ns + self._timeouts.deadline_ns
            case Action.GRANT:
                self._grant(incoming)
            case Action.WAIT:
                self._send(ticket_id[0], Wait(ticket_id))
            case Action.REFUSE:
                self._send(ticket_id[0], Refuse(ticket_id, incoming.reason))
            case Action.PUBLISH:
                self._publish(incoming, now_ns)
            case Action.INSERTED:
                self._send(ticket_id[0], Inserted(ticket_id))
            case Action.FAIL:
                if incoming.state is ReceiverState.QUARANTINED:
                    incoming.holder = self._pool.allocator.rename(incoming.holder, ("quarantine", *ticket_id))
                incoming.deadline_ns = now_ns + self._timeouts.retry_ns
            case Action.ABANDON:
                self._send(ticket_id[0], Abandon(ticket_id, incoming.reason))
            case Action.RELEASE:
                self._pool.release_all(incoming.holder)
            case _:
                raise AssertionError(f"a receiver does not {action}")

    def _grant(self, incoming: Incoming) -> None:
        addrs = self._book.addresses(incoming.blocks[incoming.num_held // self._pool.block_size :])
        grant = Grant(incoming.ask.ticket, pack_times(addrs), incoming.num_held, self._size)
        self._send(incoming.ask.ticket[0], grant)

    def _publish(self, incoming: Incoming, now_ns: int) -> None:
        """Insertion, the third step: only now does anybody here see the KV."""
        tokens, blocks = incoming.tokens, incoming.blocks
        incoming.deadline_ns = NEVER_NS
        if incoming.ask.insert:
            num_full = len(tokens) // self._pool.block_size
            canonical = self._pool.publish(tokens[: num_full * self._pool.block_size], blocks[:num_full])
            self._pool.hold(canonical, incoming.holder)
        arrived_ns = min(incoming.arrived_ns, now_ns)  # the sender's clock may be a little ahead
        arrival = Arrival(
            incoming.ask.ticket, tokens, blocks, incoming.num_held, incoming.private,
            incoming.read_ns, incoming.granted_ns, arrived_ns, received_ns=now_ns,
        )  # fmt: skip
        self._arrivals.append(arrival)
