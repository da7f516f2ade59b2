"""Sending: the tickets that one pool writes under. Performs the sender's half of protocol.py; knows no request.

    start -> Ask .. Grant -> moves are posted as blocks become ready -> drained -> Done .. Inserted -> ticket DONE

The source blocks are held by ("transfer", own incarnation, n) from `start` until the last posted move has drained; by
("quarantine", own incarnation, n) after the ticket has failed.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping

import numpy as np

from memserve.clock import to_s
from memserve.kvcache.alarms import Alarms
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.granularity import Granularity
from memserve.kvcache.outgoing import Outgoing
from memserve.kvcache.posting import Posting
from memserve.kvcache.protocol import Action, SenderEvent, SenderState, sender_step
from memserve.kvcache.ticket import Sent, Ticket, TicketState, Timeouts, TransferCounts
from memserve.messages import (
    Abandon,
    AbortAck,
    Ask,
    Done,
    Grant,
    PoolMessage,
    PoolSize,
    Refuse,
    unpack_times,
    unpack_tokens,
)
from memserve.transfer.transport import Arrived, Transport

Send = Callable[[int, PoolMessage], None]
DECLINED = "declined"  # how a refusal for lack of room begins
BUSY = f"{DECLINED}: busy"  # and one for what else is under way
NUM_REMEMBERED = 4096  # of what was sent, for who may want to know


class Sending:
    """Outgoing tickets of one pool. send: takes (incarnation, message)."""

    def __init__(
        self, pool: BlockPool, transport: Transport, granularity: Granularity, timeouts: Timeouts, send: Send
    ) -> None:
        self.counts_by_peer: defaultdict[int, TransferCounts] = defaultdict(TransferCounts)
        self.tickets: dict[tuple[int, int], Outgoing] = {}
        self._pool, self._posting = pool, Posting(pool, transport, granularity)
        self._timeouts, self._send = timeouts, send
        self._alarms: Alarms[tuple[int, int]] = Alarms()
        self._unchecked: set[tuple[int, int]] = set()  # of which more is ready, and perhaps nothing of it had to move
        self._ended: list[Ticket] = []
        self._sent: deque[Sent] = deque(maxlen=NUM_REMEMBERED)

    def start(
        self,
        peer: int,
        ask: Ask,
        blocks: np.ndarray,
        num_layers: int,
        now_ns: int,
        *,
        ready: bool,
        told: bool,
        target_pool: PoolSize | None = None,
    ) -> Ticket:
        """Asks `peer`. ready: all blocks (int32 [n]) are final; else `mark_ready` says when.  told: as well as all that
        the receiver is to know; else `tell` follows.

        target_pool: the peer's, where the Ask brings addresses: what is ready leaves at once.
        """
        ticket = Ticket(ask.ticket, np.empty(0, dtype=np.int64))
        posted = np.zeros(num_layers, dtype=np.int64)
        deadline_ns, retry_ns = now_ns + self._timeouts.patience_ns, now_ns + self._timeouts.retry_ns
        out = Outgoing(
            ticket, peer, ask, blocks.copy(), posted + (len(blocks) if ready else 0), posted, deadline_ns, retry_ns,
            self.counts_by_peer[peer], is_told=told,
        )  # fmt: skip
        self._pool.retain(out.blocks, out.holder)
        self.tickets[ask.ticket] = out
        self._send(peer, ask)
        if target_pool is not None:
            out.targets, out.target_pool = unpack_times(ask.addrs), target_pool
            out.state, out.deadline_ns = SenderState.SENDING, now_ns + self._timeouts.deadline_ns
            self._posting.ready(out, now_ns)
        self._alarms.put(ask.ticket, out.next_time_ns)
        return ticket

    def mark_ready(self, ticket_id: tuple[int, int], num_blocks: int, layers_ns: Mapping[int, int]) -> None:
        """The first `num_blocks` blocks are final in these layers, since when each."""
        out = self.tickets.get(ticket_id)
        if out is not None and out.state is SenderState.ASKED:
            out.early[num_blocks] = {**layers_ns, **out.early.get(num_blocks, {})}
        elif out is not None and out.state is SenderState.SENDING:
            self._posting.marked(out, num_blocks, layers_ns)
            self._unchecked.add(ticket_id)

    def tell(self, ticket_id: tuple[int, int], private: bytes) -> None:
        """What `Done` says, instead of what the Ask did."""
        if (out := self.tickets.get(ticket_id)) is not None:
            out.private, out.is_told = private, True
            self._unchecked.add(ticket_id)

    def receive(self, receiver: int, message: PoolMessage, now_ns: int) -> None:
        """Takes an answer of the receiver."""
        out = self.tickets.get(message.ticket)
        event = SenderEvent(type(message).__name__)
        if out is None:  # it ended here: whoever still waits learns that nothing more will be written
            _, actions = sender_step(SenderState.ENDED, event)
            for action in actions:
                self._send(receiver, Abandon(message.ticket, "it had ended") if action is Action.ABANDON
                           else AbortAck(message.ticket))  # fmt: skip
            return
        if isinstance(message, Grant) and out.state is SenderState.ASKED:
            out.targets, out.num_held = unpack_times(message.addrs), message.num_held
            out.target_pool = message.pool
            out.deadline_ns = now_ns + self._timeouts.deadline_ns
        if isinstance(message, Refuse) and out.state is not SenderState.DRAINING:
            out.ticket.refused = True
        reason = message.reason if isinstance(message, Refuse | Abandon) else ""
        self.event(out, event, now_ns, reason)

    def arrived(self, arrived: Arrived, now_ns: int) -> None:
        """A posted move is complete."""
        out = self.tickets[arrived.move_id[:2]]
        out.arrived(arrived)
        out.counts.elapsed_ns += arrived.ended_ns - arrived.begun_ns
        self._check_drained(out, now_ns)

    def wants(self, arrived: Arrived) -> bool:
        """Whether the end of a move may end its ticket, and is to be told at once."""
        out = self.tickets.get(arrived.move_id[:2])
        return out is not None and out.is_closing

    def let_time_pass(self, now_ns: int) -> None:
        """Ends tickets whose deadline is over; asks again for answers that are missing."""
        unchecked, self._unchecked = self._unchecked, set()
        for ticket_id in sorted(unchecked.union(self._alarms.due(now_ns))):
            if (out := self.tickets.get(ticket_id)) is not None:
                self._let_time_pass(out, now_ns)

    def _let_time_pass(self, out: Outgoing, now_ns: int) -> None:
        if out.state is not SenderState.DRAINING and now_ns >= out.deadline_ns:
            asked, t = out.state is SenderState.ASKED, self._timeouts
            reason = (
                f"no grant of the transfer within its patience, {to_s(t.patience_ns):g} s"
                if asked
                else f"no end of the transfer within its deadline, {to_s(t.deadline_ns):g} s"
            )
            self.event(out, SenderEvent.DEADLINE, now_ns, reason)
        elif out.state is SenderState.SENDING:
            self._check_drained(out, now_ns)
        elif now_ns >= out.retry_ns:
            out.retry_ns = now_ns + self._timeouts.retry_ns
            if out.state is SenderState.ASKED or (out.state is SenderState.SENT and out.ask.addrs):
                self._send(out.peer, out.ask)
            if out.state is SenderState.SENT:
                self._send(out.peer, Done(out.ask.ticket, out.private, out.ended_ns))
            self._alarms.put(out.ask.ticket, out.next_time_ns)

    def event(self, out: Outgoing, event: SenderEvent, now_ns: int, reason: str = "") -> None:
        """Steps the automaton."""
        out.state, actions = sender_step(out.state, event)
        for action in actions:
            self._perform(out, action, now_ns, reason)
        self._alarms.put(out.ask.ticket, out.next_time_ns)
        if out.state is SenderState.SENDING or out.state is SenderState.DRAINING:
            self._check_drained(out, now_ns)

    def keep_paths(self, blocks: np.ndarray) -> None:
        """Tickets that send any of `blocks` (int32 [n]) hold all that is cached of their tokens."""
        for out in [out for out in self.tickets.values() if np.isin(out.blocks, blocks).any()]:
            self._pool.hold(self._pool.index.peek(unpack_tokens(out.ask.tokens)).blocks, out.holder)

    def is_writing_to(self, peer: int, addrs: np.ndarray) -> bool:
        """Whether any of the peer's addresses is the target of a ticket that has not ended."""
        return any(out.peer == peer and np.isin(addrs, out.targets).any() for out in self.tickets.values())

    def peer_gone(self, incarnation: int, now_ns: int) -> None:
        """Whoever was asked by these tickets is gone."""
        for out in [o for o in self.tickets.values() if o.peer == incarnation]:
            self.event(out, SenderEvent.PEER_GONE, now_ns, f"instance {incarnation} is gone")

    def drain_ended(self) -> list[Ticket]:
        """Tickets whose outcome is known since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def drain_sent(self) -> list[Sent]:
        """What was sent and has ended since the last call; the latest NUM_REMEMBERED of it."""
        sent = list(self._sent)
        self._sent.clear()
        return sent

    def next_time_ns(self) -> int | None:
        """When time alone does something to a ticket."""
        return self._alarms.next_ns()

    def _perform(self, out: Outgoing, action: Action, now_ns: int, reason: str) -> None:
        ticket_id = out.ask.ticket
        match action:
            case Action.POST:
                self._post_granted(out, now_ns)
            case Action.SUCCEED:
                self._end(out, TicketState.DONE, "")
                out.counts.tokens += out.num_tokens
            case Action.FAIL:
                self._end(out, TicketState.FAILED, reason)
                out.counts.bytes_in_vain += out.num_bytes
                if out.state is SenderState.DRAINING:
                    out.holder = self._pool.allocator.rename(out.holder, ("quarantine", *ticket_id))
                if reason.startswith(DECLINED):
                    out.counts.declined += 1
                else:
                    out.counts.failed += 1
            case Action.RELEASE:
                self._pool.release_all(out.holder)
                del self.tickets[ticket_id]
                self._note(out)
            case Action.DONE:
                out.retry_ns = now_ns + self._timeouts.retry_ns
                out.ended_ns = now_ns if out.begun_ns is None else out.ended_ns
                self._send(out.peer, Done(ticket_id, out.private, out.ended_ns))
            case Action.ABANDON:
                self._send(out.peer, Abandon(ticket_id, reason))
            case Action.ABORT_ACK:
                self._send(out.peer, AbortAck(ticket_id))
            case _:
                raise AssertionError(f"a sender does not {action}")

    def _end(self, out: Outgoing, state: TicketState, reason: str) -> None:
        out.ticket.state, out.ticket.reason, out.ticket.addrs = state, reason, out.targets
        self._ended.append(out.ticket)

    def _note(self, out: Outgoing) -> None:
        if out.begun_ns is not None:
            num_tokens = out.num_tokens if out.ticket.state is TicketState.DONE else 0
            self._sent.append(Sent(out.ask.ticket, out.peer, out.begun_ns, out.ended_ns, num_tokens, out.num_bytes))

    def _post_granted(self, out: Outgoing, now_ns: int) -> None:
        """What is final by now leaves, and the layers that the step under way has still to write leave then, each."""
        early, out.early = out.early, {}
        for num_blocks, layers_ns in early.items():
            for layer, ready_ns in layers_ns.items():
                if ready_ns <= now_ns:
                    out.mark(num_blocks, layer)
        self._posting.ready(out, now_ns)
        for num_blocks, layers_ns in early.items():
            self._posting.marked(out, num_blocks, {i: then_ns for i, then_ns in layers_ns.items() if then_ns > now_ns})

    def _check_drained(self, out: Outgoing, now_ns: int) -> None:
        is_told = out.is_told or out.state is SenderState.DRAINING
        is_open = out.state in (SenderState.SENDING, SenderState.DRAINING)
        if is_open and is_told and not out.num_under_way and out.is_closing:
            self.event(out, SenderEvent.DRAINED, now_ns)
