"""The three steps between two pools: what moves, in how many calls, who holds what, and how every failure ends."""

import numpy as np
import pytest
import torch
from kvcache.transfer_pair import GRANULARITIES, LAYOUTS, REQUEST, SHAPE, TIMEOUTS, B, Wires, tokens

from memserve.kvcache import Medium
from memserve.kvcache.ticket import TicketState, TransferOptions
from memserve.messages import Abandon, AbortAck, Ask, Done, Grant, Inserted, Refuse, Wait
from memserve.metrics.occupancy import count_blocks
from memserve.transfer import LinkModel

INSERT = TransferOptions(insert=True)
PLAIN = TransferOptions()
SLOW = LinkModel(latency_s=0.1 / SHAPE.num_layers, gb_per_s=1.0)
COMBINATIONS = [(g, a) for g in GRANULARITIES for a in LAYOUTS if (g, a) != ("by_request_agg", "discrete")]


def held_by_transfers(pool):
    return [h for h in pool.blocks.allocator.holders() if h[0] in ("transfer", "quarantine")]


def send(wires, sender, receiver, num_tokens, options=PLAIN, **more):
    """Starts a transfer of new KV of num_tokens tokens; (its ticket, its blocks)."""
    blocks = sender.fill(num_tokens)
    ticket = sender.transfers.start(
        receiver.transfers.incarnation, tokens(num_tokens), blocks, options, b"mine", wires.now_ns, **more
    )
    return ticket, blocks


def arrived(wires, pool):
    """Lets time pass until no ticket is open, none of them late; what reached the pool."""
    wires.run(until_ns=900_000)
    (arrival,) = pool.transfers.drain_arrivals()
    return arrival


@pytest.mark.parametrize(("granularity", "layout"), COMBINATIONS)
@pytest.mark.parametrize("num_tokens", [1, B, B + 1, 5 * B - 1])
def test_kv_arrives_bit_by_bit_in_the_paper_s_number_of_calls(granularity, layout, num_tokens):
    wires = Wires(granularity=granularity, layout=layout)
    p, d = wires.pool(1), wires.pool(2)
    ticket, blocks = send(wires, p, d, num_tokens, INSERT)
    arrival = arrived(wires, d)
    assert ticket.state is TicketState.DONE and wires.ended == [ticket]
    assert torch.equal(d.kv(arrival.blocks), p.kv(blocks))
    assert arrival.private == b"mine" and arrival.tokens.tolist() == list(range(num_tokens)) and arrival.num_held == 0
    small = 2 * SHAPE.num_layers * len(blocks)
    assert p.transfers.counts.calls == {"by_request_agg": len(blocks), "packed": 1}.get(granularity, small)
    assert p.transfers.counts.bytes == len(blocks) * SHAPE.block_bytes
    assert p.transfers.counts.tokens == num_tokens
    assert wires.log == ["Ask", "Grant", "Done", "Inserted"]
    assert d.blocks.match(tokens(num_tokens)).num_tokens == num_tokens // B * B
    d.transfers.settle(arrival)
    assert not held_by_transfers(p) and not held_by_transfers(d)
    wires.check()


def test_only_what_the_receiver_lacks_is_sent_in_its_whole_blocks():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    d.blocks.publish(tokens(2 * B), d.fill(2 * B, seed=5))
    d.blocks.release_all(REQUEST)
    ticket, blocks = send(wires, p, d, 3 * B + 2, INSERT)
    arrival = arrived(wires, d)
    assert ticket.state is TicketState.DONE and arrival.num_held == 2 * B
    assert p.transfers.counts.tokens == B + 2
    assert p.transfers.counts.bytes == 2 * SHAPE.block_bytes
    assert torch.equal(d.kv(arrival.blocks[2:]), p.kv(blocks[2:]))


def test_a_plain_transfer_neither_uses_nor_fills_the_receivers_index():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    d.blocks.publish(tokens(2 * B), d.fill(2 * B))
    before = d.blocks.index.num_blocks
    send(wires, p, d, 3 * B)
    arrival = arrived(wires, d)
    assert arrival.num_held == 0 and p.transfers.counts.tokens == 3 * B and d.blocks.index.num_blocks == before


@pytest.mark.parametrize("source", list(Medium))
@pytest.mark.parametrize("target", list(Medium))
@pytest.mark.parametrize("granularity", ["by_request", "by_layer", "packed"])
def test_either_end_may_lie_in_dram(source, target, granularity):
    wires = Wires(num_dram_blocks=20, granularity=granularity)
    p, d = wires.pool(1), wires.pool(2)
    blocks = np.concatenate([p.fill(B, seed=1), p.fill(2 * B, medium=source, seed=2)])
    p.transfers.start(2, tokens(3 * B), blocks, TransferOptions(medium=target), b"", 0)
    arrival = arrived(wires, d)
    assert (arrival.blocks >= d.blocks.num_blocks).all() == (target is Medium.DRAM)
    assert torch.equal(d.kv(arrival.blocks), p.kv(blocks))


def test_by_layer_sends_each_layer_when_it_is_ready_and_ends_with_the_last():
    wires = Wires(granularity="by_layer")
    p, d = wires.pool(1), wires.pool(2)
    ticket, blocks = send(wires, p, d, 3 * B, ready=False)
    wires.deliver()
    assert p.transfers.is_granted(ticket) and p.transfers.counts.calls == 0
    for num_blocks in (1, 3):
        for layer in range(SHAPE.num_layers):
            p.transfers.mark_ready(ticket, num_blocks, {layer: wires.now_ns})
    assert p.transfers.counts.calls == 2 * SHAPE.num_layers * 3
    assert not ticket.ended
    arrival = arrived(wires, d)
    assert ticket.state is TicketState.DONE and torch.equal(d.kv(arrival.blocks), p.kv(blocks))


def test_by_layer_what_was_final_before_the_grant_leaves_with_it_and_later_layers_when_they_are_written():
    """A first block in all layers, then the grant while a step writes the two others, layer after layer."""
    wires = Wires(granularity="by_layer")
    p, d = wires.pool(1), wires.pool(2, num_blocks=4)
    other = d.blocks.alloc(3, ("request", "other", 0))
    ticket, blocks = send(wires, p, d, 3 * B, ready=False)
    wires.deliver()
    for layer in range(SHAPE.num_layers):
        p.transfers.mark_ready(ticket, 1, {layer: wires.now_ns})
    written_ns = [wires.now_ns + 200_000 * (layer + 1) for layer in range(SHAPE.num_layers)]
    for layer, ready_ns in enumerate(written_ns):
        p.transfers.mark_ready(ticket, 3, {layer: ready_ns})
    assert not p.transfers.is_granted(ticket)
    granted_ns = wires.now_ns = (written_ns[0] + written_ns[1]) // 2
    d.blocks.release(other, ("request", "other", 0))
    wires.deliver()
    assert p.transfers.is_granted(ticket) and p.transfers.counts.calls == 2 * SHAPE.num_layers * 3
    assert p.transfers.counts.transfers == 2 * (1 + 2 + 2)  # three blocks of layer 0; one, then two of the others
    arrival = arrived(wires, d)
    assert torch.equal(d.kv(arrival.blocks), p.kv(blocks))
    (sent,) = p.transfers.drain_sent()
    assert sent.begun_ns == granted_ns and sent.ended_ns > written_ns[-1]


def test_a_hand_off_waits_for_room_with_its_blocks_held_at_the_sender():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=4)
    other = d.blocks.alloc(3, ("request", "other", 0))
    ticket, _ = send(wires, p, d, 2 * B)
    wires.deliver()
    assert wires.log == ["Ask", "Wait"] and held_by_transfers(p) and not held_by_transfers(d)
    d.blocks.release(other, ("request", "other", 0))
    wires.run(until_ns=900_000)
    assert ticket.state is TicketState.DONE


def test_a_transfer_that_came_too_late_names_what_was_too_short_for_it():
    """There are two times that it may have passed, and an option for each."""
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=4)
    d.blocks.alloc(3, ("request", "other", 0))
    waiting, _ = send(wires, p, d, 2 * B)
    wires.run(until_ns=TIMEOUTS.patience_ns + 1)
    assert waiting.reason == "no grant of the transfer within its patience, 0.005 s"
    d.blocks.release_all(("request", "other", 0))
    unanswered, _ = send(wires, p, d, 2 * B)
    wires.lose = lambda message: isinstance(message, Done)
    wires.run(until_ns=2 * TIMEOUTS.patience_ns + 1)
    assert unanswered.reason == "no end of the transfer within its deadline, 0.001 s"


def test_waiting_asks_are_granted_in_order():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=6)
    other = d.blocks.alloc(5, ("request", "other", 0))
    first, _ = send(wires, p, d, 2 * B)
    wires.deliver()
    p.blocks.release_all(REQUEST)
    second, _ = send(wires, p, d, B)
    wires.deliver()
    assert not p.transfers.is_granted(second), "one that came later would fit, and waits its turn"
    d.blocks.release(other, ("request", "other", 0))
    wires.deliver()
    assert p.transfers.is_granted(first) and p.transfers.is_granted(second)


def test_headroom_is_kept_for_running_requests_and_not_when_nothing_runs():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=4, headroom_blocks=2)
    other = d.blocks.alloc(1, ("request", "other", 0))
    ticket, _ = send(wires, p, d, 2 * B)
    wires.deliver()
    assert wires.log == ["Ask", "Wait"]
    d.blocks.release(other, ("request", "other", 0))
    wires.deliver()
    assert p.transfers.is_granted(ticket)


@pytest.mark.parametrize("where", ["in DRAM", "in use"])
def test_headroom_is_kept_though_a_prefix_is_held_that_takes_no_room_or_that_a_running_request_uses_too(where):
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=8, num_dram_blocks=3, headroom_blocks=3)
    running = ("request", "running", 0)
    cached = d.fill(3 * B, running, medium=int(where == "in DRAM"))
    d.blocks.publish(tokens(3 * B), cached)
    if where == "in DRAM":
        d.blocks.release_all(running)
        d.blocks.alloc(3, running)
    ticket, _ = send(wires, p, d, 6 * B, TransferOptions(insert=True))
    wires.deliver()
    assert wires.log == ["Ask", "Wait"]
    d.blocks.release_all(running)
    wires.deliver()
    assert p.transfers.is_granted(ticket)


def test_best_effort_is_declined_instead_of_waiting_and_counted_apart():
    wires = Wires()
    d, p = wires.pool(1), wires.pool(2, num_blocks=2)
    p.blocks.alloc(2, ("request", "other", 0))
    ticket, _ = send(wires, d, p, B, TransferOptions(insert=True, best_effort=True))
    wires.run()
    assert ticket.state is TicketState.FAILED and ticket.reason.startswith("declined")
    assert (d.transfers.counts.declined, d.transfers.counts.failed) == (1, 0) and not held_by_transfers(d)


def test_pinned_blocks_stay_held_after_they_are_settled():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    send(wires, p, d, 2 * B, TransferOptions(insert=True, pinned=True))
    arrival = arrived(wires, d)
    d.transfers.settle(arrival)
    assert d.blocks.allocator.held_by(("transfer", 1, 1)).tolist() == arrival.blocks.tolist()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"layout": "aggregated"}, "layout='discrete': the receiver has layout='aggregated'"),
        ({"num_blocks": 1}, "2 blocks: the receiver has 1"),
    ],
)
def test_what_can_never_be_received_is_refused_by_name(changed, named):
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, **changed)
    ticket, _ = send(wires, p, d, 2 * B)
    wires.run()
    assert ticket.state is TicketState.FAILED and named in ticket.reason
    assert not held_by_transfers(p) and not held_by_transfers(d)


def test_bad_calls_are_refused_and_hold_nothing():
    wires = Wires()
    p = wires.pool(1)
    wires.pool(2)
    blocks = p.fill(2 * B)
    with pytest.raises(ValueError, match="transfer to instance 1: expected another instance"):
        p.transfers.start(1, tokens(2 * B), blocks, PLAIN, b"", 0)
    with pytest.raises(ValueError, match="2 blocks for 3 tokens: expected 1"):
        p.transfers.start(2, tokens(3), blocks, PLAIN, b"", 0)
    with pytest.raises(ValueError, match="0 blocks for 0 tokens"):
        p.transfers.start(2, tokens(0), blocks[:0], PLAIN, b"", 0)
    assert p.transfers.num_open == 0 and not held_by_transfers(p)


@pytest.mark.parametrize("kind", [Ask, Grant, Done, Inserted])
def test_a_lost_message_is_asked_for_again(kind):
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    lost = []

    def lose_the_first(message):
        if isinstance(message, kind) and not lost:
            lost.append(message)
            return True
        return False

    wires.lose = lose_the_first
    ticket, _ = send(wires, p, d, 2 * B, INSERT)
    wires.run(until_ns=900_000)
    assert lost and ticket.state is TicketState.DONE
    assert len(d.transfers.drain_arrivals()) == 1


def test_a_receiver_that_hears_nothing_quarantines_until_the_writer_has_stopped():
    wires = Wires(link=SLOW)
    p, d = wires.pool(1), wires.pool(2)
    ticket, _ = send(wires, p, d, 2 * B)
    wires.deliver()
    wires.now_ns = TIMEOUTS.deadline_ns
    wires.lose = lambda message: True
    wires.deliver()
    assert ticket.state is TicketState.FAILED
    assert d.transfers.num_quarantined == 2 and p.transfers.num_quarantined == 2
    for pool in (d, p):
        assert held_by_transfers(pool) == [("quarantine", 1, 1)]
        assert count_blocks(pool.blocks)[0]["quarantine"] == 2
    wires.lose = lambda message: False
    wires.run(until_ns=500_000_000)
    assert d.transfers.num_quarantined == p.transfers.num_quarantined == 0
    assert not held_by_transfers(p) and not held_by_transfers(d) and d.transfers.drain_arrivals() == []
    assert wires.now_ns >= 200_000_000, "not before the slow writer had drained"


def test_proof_that_the_sender_is_gone_releases_at_once():
    wires = Wires(link=SLOW)
    p, d = wires.pool(1), wires.pool(2)
    send(wires, p, d, 2 * B)
    wires.deliver()
    assert held_by_transfers(d)
    wires.transport.detach(1)
    del wires.pools[1]
    d.transfers.peer_gone(1, wires.now_ns)
    assert not held_by_transfers(d) and d.transfers.num_open == 0


def test_proof_that_the_receiver_is_gone_fails_the_ticket_once_its_calls_have_drained():
    wires = Wires(link=SLOW)
    p, d = wires.pool(1), wires.pool(2)
    ticket, _ = send(wires, p, d, 2 * B)
    wires.deliver()
    wires.transport.detach(2)
    del wires.pools[2], d
    p.transfers.peer_gone(2, wires.now_ns)
    assert ticket.state is TicketState.FAILED and held_by_transfers(p)
    wires.run(until_ns=500_000_000)
    assert not held_by_transfers(p)


def test_nothing_is_said_to_an_instance_that_is_gone():
    wires = Wires(link=SLOW)
    p, d = wires.pool(1), wires.pool(2)
    send(wires, p, d, 2 * B)
    wires.deliver()
    send(wires, p, d, B)  # is on its way out
    wires.transport.detach(2)
    p.transfers.peer_gone(2, wires.now_ns)
    p.transfers.poll(10**10)
    assert p.transfers.drain_outbox() == [] and p.transfers.num_open == 0 and not held_by_transfers(p)


@pytest.mark.parametrize("when", ["asked", "sending"])
def test_a_cancelled_ticket_ends_at_both_sides(when):
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    ticket, _ = send(wires, p, d, 2 * B)
    if when == "sending":
        wires.deliver()
    p.transfers.cancel(ticket, "the client went away", wires.now_ns)
    assert ticket.state is TicketState.FAILED and ticket.reason == "the client went away"
    wires.run()
    assert not held_by_transfers(p) and not held_by_transfers(d) and d.transfers.drain_arrivals() == []


@pytest.mark.parametrize("first", [Abandon, AbortAck])
@pytest.mark.parametrize("num_free", [0, 4])
def test_an_ask_that_comes_after_its_own_end_gets_no_room_and_no_place_in_the_queue(first, num_free):
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=4)
    d.blocks.alloc(4 - num_free, ("request", "other", 0))
    ticket, _ = send(wires, p, d, 2 * B)
    p.transfers.cancel(ticket, "the client went away", 0)
    said = [message for _, message in p.transfers.drain_outbox()]
    for message in [m for m in said if isinstance(m, first)] + [m for m in said if isinstance(m, Ask)]:
        d.transfers.receive(1, message, 0)
    assert not d.transfers.has_waiting and d.transfers.num_open == 0 and not held_by_transfers(d)
    assert [message for _, message in d.transfers.drain_outbox()] == [Refuse(ticket.ticket_id, "the ticket has ended")]


def test_the_end_of_a_ticket_that_was_received_is_not_forgotten_for_a_late_abort():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    ticket, _ = send(wires, p, d, 2 * B, INSERT)
    d.transfers.settle(arrived(wires, d))
    d.transfers.receive(1, AbortAck(ticket.ticket_id), wires.now_ns)
    d.transfers.receive(1, Done(ticket.ticket_id, b"", 0), wires.now_ns)
    assert [message for _, message in d.transfers.drain_outbox()] == [Inserted(ticket.ticket_id)]


def test_what_has_all_moved_is_done_only_when_its_receiver_can_be_told_all_of_it():
    """By layer the last bytes may arrive before the step's first token is known, which goes with `Done`."""
    wires = Wires(granularity="by_layer")
    p, d = wires.pool(1), wires.pool(2)
    ticket, blocks = send(wires, p, d, 2 * B, ready=False, told=False)
    wires.deliver()
    for layer in range(SHAPE.num_layers):
        p.transfers.mark_ready(ticket, len(blocks), {layer: wires.now_ns})
    moved_ns = wires.now_ns = wires.now_ns + 100_000
    p.transfers.hear_moves(wires.now_ns)
    p.transfers.receive(2, Wait(ticket.ticket_id), wires.now_ns)
    wires.deliver()
    assert "Done" not in wires.log and p.transfers.counts.calls == 2 * SHAPE.num_layers * len(blocks)
    wires.now_ns += 50_000
    p.transfers.tell(ticket, b"with its first token")
    wires.deliver()
    (arrival,) = d.transfers.drain_arrivals()
    assert arrival.private == b"with its first token" and arrival.received_ns == wires.now_ns
    assert arrival.granted_ns < arrival.arrived_ns < moved_ns


def test_a_repeat_of_any_message_changes_nothing():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2)
    said = []
    wires.lose = lambda message: said.append(message) or False
    ticket, _ = send(wires, p, d, 2 * B, INSERT)
    wires.run(until_ns=900_000)
    d.transfers.settle(d.transfers.drain_arrivals()[0])
    for message in [*said, AbortAck(ticket.ticket_id)]:
        here, sender = (p, 2) if type(message).__name__ in ("Grant", "Inserted") else (d, 1)
        here.transfers.receive(sender, message, wires.now_ns)
    wires.run()
    assert d.transfers.drain_arrivals() == [] and not held_by_transfers(p) and not held_by_transfers(d)
    wires.check()


def test_of_those_who_wait_for_room_a_smaller_level_is_given_it_first_and_of_one_level_who_came_first():
    wires = Wires()
    p, d = wires.pool(1), wires.pool(2, num_blocks=4)
    d.transfers.order_by(float)
    busy = d.blocks.alloc(4, REQUEST)
    for number, level in enumerate((2, 1, 2, 1, 0)):
        p.transfers.start(2, tokens(B, 100 * number), p.fill(B), PLAIN, str(level).encode(), wires.now_ns)
    wires.run(until_ns=2 * TIMEOUTS.retry_ns)  # all are asked again meanwhile, which changes no order
    assert wires.log.count("Grant") == 0 and wires.log.count("Wait") > 5
    came = []
    for block in busy[:2]:
        d.blocks.release(np.array([block], dtype=np.int32), REQUEST)
    for _ in range(5):
        wires.run(until_ns=wires.now_ns + TIMEOUTS.retry_ns)
        for arrival in d.transfers.drain_arrivals():
            came.append(int(arrival.tokens[0]) // 100)
            d.transfers.settle(arrival)
    assert came == [4, 1, 3, 0, 2]
    d.blocks.release_all(REQUEST)
    wires.check()
