"""Alarms beside a dict of times, and tickets that are woken by them and not looked at otherwise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvcache.transfer_pair import B, Wires, tokens

from memserve.kvcache.alarms import Alarms
from memserve.kvcache.ticket import TicketState, TransferOptions

keys = st.tuples(st.integers(0, 3), st.integers(0, 3))
times = st.none() | st.integers(0, 5)


@given(st.lists(st.tuples(keys, times, st.integers(0, 5)), max_size=300))
def test_the_next_time_and_who_is_due_are_those_of_a_look_at_all(steps):
    alarms, expected = Alarms(), {}
    for key, time_ns, now_ns in steps:
        alarms.put(key, time_ns)
        expected[key] = time_ns
        set_ones = {k: t for k, t in expected.items() if t is not None}
        for _ in range(2):
            assert alarms.next_ns() == min(set_ones.values(), default=None)
            assert alarms.due(now_ns) == sorted(k for k, t in set_ones.items() if t <= now_ns)


def test_what_was_put_anew_or_dropped_does_not_pile_up():
    alarms = Alarms()
    for time_ns in range(10_000):
        alarms.put((1, 1), time_ns)
        alarms.put((2, time_ns), 10**9)
        alarms.put((2, time_ns), None)
        assert len(alarms._heap) < 100
    assert alarms.next_ns() == 9_999


def looked_at(pool, count):
    """How many of the open tickets a pool's `poll` and `next_time_ns` steps or asks, while nothing is due."""
    transfers, seen = pool.transfers, []
    for part in (transfers._sending, transfers._receiving):
        part.tickets = Counting(part.tickets, seen)
    transfers.poll(1), transfers.next_time_ns(), transfers.has_waiting
    assert transfers.num_open == count
    return len(seen)


class Counting(dict):
    """Notes every look at an entry."""

    def __init__(self, entries, seen):
        super().__init__(entries)
        self._seen = seen

    def values(self):
        self._seen += list(self)
        return super().values()


@pytest.mark.parametrize("there_is_room", [True, False])
def test_open_tickets_are_not_looked_at_before_their_time(there_is_room):
    wires = Wires(num_blocks=60)
    p, d = wires.pool(1), wires.pool(2)
    if not there_is_room:
        d.blocks.alloc(60, ("request", "other", 0))
    for i in range(50):
        blocks = p.fill(B, holder=("request", "r", i))
        p.transfers.start(2, tokens(B, 100 * i), blocks, TransferOptions(), b"", 0)
    wires.deliver()
    assert looked_at(p, 50) == looked_at(d, 50) == 0
    wires.run()
    assert {ticket.state for ticket in wires.ended} == {TicketState.DONE if there_is_room else TicketState.FAILED}
    assert len(wires.ended) == 50


def test_a_ticket_of_which_nothing_had_to_move_is_done_at_the_next_poll():
    """Its last layer was ready after the grant, and the receiver has every block."""
    wires = Wires(granularity="by_layer")
    p, d = wires.pool(1), wires.pool(2)
    d.blocks.publish(tokens(B), d.fill(B, seed=5))
    blocks = p.fill(B)
    ticket = p.transfers.start(2, tokens(B), blocks, TransferOptions(insert=True), b"", 0, ready=False)
    wires.deliver()
    for layer in range(p.transfers.geometry.num_layers):
        p.transfers.mark_ready(ticket, 1, {layer: np.int64(0)})
    wires.deliver()
    assert ticket.state is TicketState.DONE and p.transfers.counts.calls == 0
