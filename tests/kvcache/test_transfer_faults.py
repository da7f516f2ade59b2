"""Whatever happens to messages and peers: every ticket ends, what arrives is right, and no block leaks or is reused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcache.transfer_pair import GRANULARITIES, TIMEOUTS, B, Wires, tokens

from memserve.kvcache.ticket import TicketState, TransferOptions
from memserve.transfer import MessageFaults

KINDS = ("Ask", "Grant", "Wait", "Refuse", "Done", "Inserted", "Abandon", "AbortAck")
LONG_NS = 100 * TIMEOUTS.patience_ns


class FaultyWires(Wires):
    """Wires whose messages take time, are lost, repeated and overtaken; peers may die."""

    def __init__(self, faults, **options):
        super().__init__(**options)
        self.faults = faults
        self.on_the_way = []
        self.started = []

    def deliver(self):
        for incarnation, pool in list(self.pools.items()):
            self.ended += pool.transfers.poll(self.now_ns)
            for peer, message in pool.transfers.drain_outbox():
                for time_ns in self.faults.times_ns(type(message).__name__, self.now_ns + 100):
                    self.on_the_way.append((time_ns, incarnation, peer, message))
        due = [m for m in self.on_the_way if m[0] <= self.now_ns]
        self.on_the_way = [m for m in self.on_the_way if m[0] > self.now_ns]
        for _, sender, peer, message in due:
            if peer in self.pools and sender in self.pools:
                self.pools[peer].transfers.receive(sender, message, self.now_ns)
        for pool in self.pools.values():
            for arrival in pool.transfers.drain_arrivals():
                sent = next(kv for t, _, kv in self.started if t.ticket_id == arrival.ticket_id)
                assert torch.equal(
                    pool.kv(arrival.blocks)[:, :, arrival.num_held // B :], sent[:, :, arrival.num_held // B :]
                )
                pool.transfers.settle(arrival)

    def step(self):
        """To the next moment at which anything happens."""
        times = [self.transport.next_time_ns(), *(p.transfers.next_time_ns() for p in self.pools.values())]
        times += [m[0] for m in self.on_the_way]
        self.now_ns = max(self.now_ns, min((t for t in times if t is not None), default=self.now_ns))
        self.deliver()
        self.check()

    def run(self, until_ns=LONG_NS):
        while (self.on_the_way or any(p.transfers.num_open for p in self.pools.values())) and self.now_ns < until_ns:
            self.step()

    def kill(self, incarnation):
        """A process dies, and everybody learns of it for sure."""
        self.transport.detach(incarnation)
        del self.pools[incarnation]
        for pool in self.pools.values():
            pool.transfers.peer_gone(incarnation, self.now_ns)

    def send(self, sender, receiver, num_tokens, options, seed):
        """Starts a transfer of KV that is then given up by the request, so that only the ticket holds it."""
        pool, holder = self.pools[sender], ("request", "r", seed)
        blocks = pool.fill(num_tokens, holder=holder, seed=seed)
        kv = pool.kv(blocks).clone()
        ticket = pool.transfers.start(receiver, tokens(num_tokens, 1000 * seed), blocks, options, b"", self.now_ns)
        pool.blocks.release_all(holder)
        self.started.append((ticket, blocks, kv))
        return ticket

    def nothing_is_left(self):
        for pool in self.pools.values():
            assert not [h for h in pool.blocks.allocator.holders() if h[0] == "transfer"]
            assert pool.transfers.num_open == pool.transfers.num_quarantined == 0


def wires(faults, **options):
    made = FaultyWires(faults, **options)
    made.pool(1), made.pool(2)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["drop", "repeat", "delay"])
@pytest.mark.parametrize("insert", [False, True])
def test_any_kind_of_message_may_be_lost_repeated_or_overtaken(kind, fault, insert):
    faults = MessageFaults(np.random.default_rng(0), **{fault: 1.0}, delay_ns=50_000, kinds=[kind], limit=2)
    w = wires(faults)
    tickets = [w.send(1 + i % 2, 2 - i % 2, (i + 1) * B, TransferOptions(insert=insert), i) for i in range(4)]
    w.run()
    assert all(ticket.state is TicketState.DONE for ticket in tickets)
    w.nothing_is_left()


@pytest.mark.parametrize("dead", [1, 2])
@pytest.mark.parametrize("num_steps", range(8))
@pytest.mark.parametrize("granularity", list(GRANULARITIES))
def test_a_peer_may_die_before_during_and_after_any_step(dead, num_steps, granularity):
    layout = "aggregated" if granularity == "by_request_agg" else "discrete"
    w = wires(MessageFaults(np.random.default_rng(0)), granularity=granularity, layout=layout)
    w.send(1, 2, 3 * B, TransferOptions(insert=True), 0)
    w.send(2, 1, 2 * B, TransferOptions(insert=True), 1)
    for _ in range(num_steps):
        w.step()
    w.kill(dead)
    w.run()
    w.nothing_is_left()


def test_a_writer_that_was_given_up_and_goes_on_writes_into_nobodys_blocks():
    w = wires(MessageFaults(np.random.default_rng(0)))
    late_ns = 20 * TIMEOUTS.deadline_ns
    w.transport.stall(1, late_ns)
    ticket = w.send(1, 2, 3 * B, TransferOptions(), 0)
    while not ticket.ended:
        w.step()
    receiver = w.pools[2]
    assert ticket.state is TicketState.FAILED and receiver.transfers.num_quarantined == 3
    others = receiver.blocks.alloc(receiver.blocks.num_available, ("request", "other", 0))
    before = receiver.kv(others).clone()
    w.run()
    assert w.now_ns >= late_ns and torch.equal(receiver.kv(others), before)
    w.nothing_is_left()
    assert receiver.blocks.num_available == 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    drop=st.floats(0, 0.4),
    repeat=st.floats(0, 0.4),
    delay=st.floats(0, 0.6),
    stall=st.sampled_from([0, TIMEOUTS.deadline_ns // 2, 3 * TIMEOUTS.deadline_ns]),
    granularity=st.sampled_from(["by_request", "packed", "by_layer"]),
    killed=st.sampled_from([None, None, 1, 2, 3]),
)
def test_no_mixture_of_faults_leaks_a_block_or_delivers_a_wrong_one(
    seed, drop, repeat, delay, stall, granularity, killed
):
    rng = np.random.default_rng(seed)
    faults = MessageFaults(rng, drop=drop, repeat=repeat, delay=delay, delay_ns=3 * TIMEOUTS.retry_ns, limit=60)
    w = wires(faults, granularity=granularity, num_blocks=12)
    w.pool(3)
    w.transport.stall(1, stall)
    tickets = []
    for i in range(8):
        alive = sorted(w.pools)
        sender, receiver = rng.choice(alive, 2, replace=False).tolist()
        options = TransferOptions(insert=bool(rng.integers(2)), best_effort=bool(rng.integers(2)))
        if w.pools[sender].blocks.num_available >= 3:
            tickets.append((sender, w.send(sender, receiver, int(rng.integers(1, 3 * B)), options, i)))
        for _ in range(int(rng.integers(0, 6))):
            w.step()
        if i == 4 and killed is not None:
            w.kill(killed)
    w.run()
    w.nothing_is_left()
    assert all(ticket.ended for sender, ticket in tickets if sender in w.pools)
