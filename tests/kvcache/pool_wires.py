"""The wires between two pools: messages that are lost, repeated and reordered, moves that take time.

What is said is delivered by rules, and time passes by rules. The models learn of each message when it is delivered
(wires_model.py); what a pool answers with must fit what its model has done, block by block.
"""

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import rule
from kvcache.pool_pair import BLOCK_SIZE, GEOMETRY
from kvcache.swap_machine import SwapMachine
from kvcache.wires_model import Receiver

from memserve.kvcache import Ticket, TicketState, Timeouts
from memserve.kvcache.granularity import ByRequest
from memserve.messages import Grant, Reserved, unpack_times
from memserve.transfer import LinkModel, StallingTransport

TIMEOUTS = Timeouts(deadline_ns=100_000, patience_ns=300_000, retry_ns=20_000)
LINK = LinkModel(latency_s=1e-6, gb_per_s=1.0)
fates = st.lists(st.sampled_from(["delivered"] * 5 + ["lost", "repeated", "overtaken"]), min_size=1, max_size=8)
waits_ns = st.sampled_from([1, 1_000, 30_000, TIMEOUTS.deadline_ns, 2 * TIMEOUTS.patience_ns])


@dataclass
class Sent:
    """A ticket as its sender has it. kv: what its blocks read as.  targets: reserved addresses that it writes to."""

    ticket: Ticket
    sender: int
    kv: list
    targets: set


@dataclass
class Reservation:
    """addrs: those not freed yet. used: of them, the ticket that wrote there last.  inserted: they may be cached."""

    ticket: Ticket
    owner: int
    holder: tuple
    addrs: list = field(default_factory=list)
    used: dict = field(default_factory=dict)
    inserted: set = field(default_factory=set)


class PoolWires(SwapMachine):
    """What befalls messages and moves, and what the models learn of it."""

    def connect(self, layout):
        self.transport, self.now_ns = StallingTransport(LINK), 0
        self.said = []  # (sender, receiver, message) on the way
        self.sent, self.writing = {}, {}  # ticket id -> Sent: all, and those whose sender holds blocks for them
        self.asked_for, self.reservations = [], []
        self.arrivals, self.pinned = [], []
        for side in self.sides.values():
            side.pool.connect(self.transport, ByRequest(layout, GEOMETRY), TIMEOUTS)
        self.receivers = {n: Receiver(side.model, TIMEOUTS.deadline_ns) for n, side in self.sides.items()}

    @rule(late_ns=st.sampled_from([0, TIMEOUTS.deadline_ns // 2, 3 * TIMEOUTS.deadline_ns]))
    def stall(self, late_ns):
        """What this side posts from now on arrives no sooner."""
        self.transport.stall(self.here, self.now_ns + late_ns)

    @rule(several=fates)
    def deliver(self, several):
        """The oldest message, or the youngest before it; or nobody ever gets it, or it comes a second time."""
        for fate in several:
            if self.said:
                sender, receiver, message = self.said.pop(-1 if fate == "overtaken" else 0)
                self.said += [(sender, receiver, message)] if fate == "repeated" else []
                if fate != "lost":
                    self.hear(sender, receiver, message)

    @rule(wait_ns=waits_ns)
    def let_time_pass(self, wait_ns):
        self.now_ns += wait_ns
        for number, side in self.sides.items():
            side.pool.poll(self.now_ns)
            self._end_tickets(number, self.receivers[7 - number])  # what is sent makes room for who waits
            self.receivers[number].let_time_pass(self.now_ns)
            self.listen(number)

    @rule()
    def let_all_go_well(self):
        for _ in range(4):
            self.deliver(["delivered"] * len(self.said))
            self.let_time_pass(TIMEOUTS.retry_ns // 2)

    def hear(self, sender, receiver, message):
        self.sides[receiver].pool.transfers.receive(sender, message, self.now_ns)
        sent = self.sent.get(message.ticket)
        self.receivers[receiver].take(message, None if sent is None else sent.kv, self.now_ns)
        self.listen(receiver)

    def listen(self, number):
        """What this pool has to say fits its model, and what it has let go of was not in use."""
        side, other = self.sides[number], 7 - number
        side.learn()
        for peer, message in side.pool.transfers.drain_outbox():
            self.said.append((number, peer, message))
            if isinstance(message, Grant):
                entry = self.receivers[number].entries[message.ticket]
                assert entry.state == "granted" and message.num_held == entry.num_held * BLOCK_SIZE
                side.follow(entry.blocks[entry.num_held :], unpack_times(message.addrs))
            elif isinstance(message, Reserved):
                held = side.model.mine(("remote", *message.ticket))
                if any(block.addr is None for block in held):
                    side.follow(held, unpack_times(message.addrs))
                    side.write(held)
        for arrival in side.pool.transfers.drain_arrivals():
            self.arrivals.append((number, arrival))
            entry = self.receivers[number].entries[arrival.ticket_id]
            assert entry.state == "done" and arrival.tokens.tolist() == entry.tokens
            side.follow(entry.blocks, side.pool.addresses(arrival.blocks))
            assert [block.kv for block in entry.blocks] == self.sent[arrival.ticket_id].kv
        self._end_tickets(number, self.receivers[other])
        self.touched.add(number)

    def _end_tickets(self, number, receiver):
        """A sender's blocks are held until its ticket has ended and the last move of it has been made."""
        model, moving = self.sides[number].model, {flow.what[0][:2] for flow in self.transport._ports.flows()}
        moving |= {a.move_id[:2] for arrived in self.transport._arrived.values() for a in arrived}
        for key, sent in [(k, s) for k, s in self.writing.items() if s.sender == number and s.ticket.ended]:
            assert sent.ticket.state is TicketState.FAILED or key in receiver.published, "DONE before it was inserted"
            held = model.held.pop(("transfer", *key), None) or model.held.pop(("quarantine", *key))
            model.take(("quarantine", *key), held)
            if key not in moving:
                model.drop(("quarantine", *key), held)
                del self.writing[key]
        for reservation in [r for r in self.asked_for if r.owner == number and r.ticket.ended]:
            self.asked_for.remove(reservation)
            if reservation.ticket.state is TicketState.DONE:
                reservation.addrs = reservation.ticket.addrs.tolist()
                self.reservations.append(reservation)
