"""Table 1's transfer and transfer_with_insert, from one MemPool to another."""

import numpy as np
import pytest
import torch
from kvcache.small_pools import GEOMETRY, A, B, make_pool

from memserve.kvcache import (
    AggregatedLayout,
    CacheGeometry,
    DiscreteLayout,
    Medium,
    MemPool,
    NotHeld,
    Placement,
    RadixIndex,
    StaleAddress,
    address,
)
from memserve.kvcache.granularity import ByRequest
from memserve.kvcache.ticket import TicketState, Timeouts, TransferOptions
from memserve.sched.check_books import check_books
from memserve.transfer import InProcess, LinkModel


@pytest.fixture
def pools():
    transport = InProcess(LinkModel(latency_s=1e-6, gb_per_s=1.0))
    made = [make_pool(num_dram_blocks=4, incarnation=i) for i in (1, 2)]
    for pool in made:
        pool.connect(transport, ByRequest(DiscreteLayout(), GEOMETRY), Timeouts(10**9, 10**9, 10**8))
        pool.kv.copy_(torch.randn(pool.kv.shape))
    return made


def play(pools, until_ns=10**6, step_ns=1000, fault=("", ""), lose=lambda message: False):
    """Delivers what is said for until_ns more; the tickets that ended. fault: what befalls the first of a kind."""
    start_ns = pools[0]._now_ns
    by_number, ended, late = {pool.incarnation: pool for pool in pools}, [], []
    kind, how = fault
    for now_ns in range(start_ns, start_ns + until_ns, step_ns):
        for due_ns, sender, peer, message in [entry for entry in late if entry[0] <= now_ns]:
            by_number[peer].transfers.receive(sender, message, due_ns)
        late = [entry for entry in late if entry[0] > now_ns]
        for pool in pools:
            ended += pool.poll(now_ns)
            for peer, message in pool.transfers.drain_outbox():
                hit = type(message).__name__ == kind
                kind = "" if hit else kind
                if hit and how != "lost":
                    late.append((now_ns + until_ns // 2, pool.incarnation, peer, message))
                if not lose(message) and not (hit and how != "twice"):
                    by_number[peer].transfers.receive(pool.incarnation, message, now_ns)
    return ended


def test_transfer_moves_blocks_that_the_other_index_does_not_see(pools):
    here, there = pools
    addrs = here.alloc_mem(3, holder=A)
    ticket = here.transfer(2, addrs, private=b"for you")
    here.free_mem(addrs, holder=A)
    assert play(pools) == [ticket] and ticket.state is TicketState.DONE
    (arrival,) = there.transfers.drain_arrivals()
    assert arrival.private == b"for you"
    assert torch.equal(there.kv[:, :, there.resolve(ticket.addrs)], here.kv[:, :, :3])
    there.transfers.settle(arrival)
    assert there.stats().num_free == here.stats().num_free == 8


def test_transfer_with_insert_sends_the_increment_and_the_other_index_matches(pools):
    here, there = pools
    tokens = list(range(12))
    there.insert(tokens[:4], there.alloc_mem(1, holder=A), holder=A)
    ticket = here.transfer_with_insert(2, tokens, here.alloc_mem(3, holder=A))
    play(pools)
    there.transfers.settle(there.transfers.drain_arrivals()[0])
    assert ticket.state is TicketState.DONE and len(ticket.addrs) == 2
    assert there.match(tokens).num_tokens == 12 and here.transfers.counts.tokens == 8
    there.check(), here.check()


def test_a_ticket_under_way_follows_the_beginning_of_its_path_when_somebody_brings_that_up_from_dram(pools):
    """At both ends: else that beginning could be evicted once its mover has let go, and nothing could go before it."""
    here, there = pools
    for pool in pools:
        pool.insert(range(12), pool.alloc_mem(3, holder=A), holder=A)
        pool.blocks.release_all(A)
        pool.swap_out(3)
    here.transfer_with_insert(2, range(12), here.match(range(12)).addrs)
    there.transfer_with_insert(1, range(16), there.alloc_mem(4, holder=B))
    there.blocks.release_all(B)
    for peer, message in here.transfers.drain_outbox() + there.transfers.drain_outbox():
        (here if peer == 1 else there).transfers.receive(3 - peer, message, 0)
    for pool in pools:
        beginning = pool.match(range(8)).addrs
        pool.retain(beginning, holder=A)
        pool.swap_in(beginning, holder=A)
        pool.blocks.release_all(A)
        check_books(pool.blocks, [], [])
        assert address.medium_of(pool.match(range(12)).addrs).tolist() == [Medium.HBM, Medium.HBM, Medium.DRAM]
        assert pool.stats().num_evictable == 0
    play(pools)
    for pool in pools:
        for arrival in pool.transfers.drain_arrivals():
            pool.transfers.settle(arrival)
        check_books(pool.blocks, [], [])
        assert pool.stats().num_evictable == pool.stats().num_indexed - pool.stats().num_evictable_dram > 0


def test_pinned_blocks_are_freed_under_their_ticket_once_it_is_settled(pools):
    here, there = pools
    here.transfer(2, here.alloc_mem(2, holder=A), flags=TransferOptions(pinned=True))
    play(pools)
    (arrival,) = there.transfers.drain_arrivals()
    holder, addrs = ("transfer", *arrival.ticket_id), there.addresses(arrival.blocks)
    with pytest.raises(ValueError, match="begins with none of .*transfer"):
        there.free_mem(addrs, holder=holder)
    there.transfers.settle(arrival)
    with pytest.raises(ValueError, match="begins with none of .*transfer"):
        there.retain(addrs, holder=holder)
    there.free_mem(addrs[:1], holder=holder)
    there.free_mem(addrs[1:], holder=holder)
    with pytest.raises(ValueError, match="begins with none of .*transfer"):
        there.free_mem(addrs[:0], holder=holder)
    assert there.stats().num_free == 8
    there.check()


def test_an_arrival_is_inherited_under_no_name_of_the_pool_s_own(pools):
    here, there = pools
    here.transfer(2, here.alloc_mem(2, holder=A))
    play(pools)
    (arrival,) = there.transfers.drain_arrivals()
    with pytest.raises(ValueError, match="begins with none of .*index"):
        there.transfers.settle(arrival, ("index",))
    there.transfers.settle(arrival, A)
    there.check()


def test_bad_transfers_are_refused_by_name_and_hold_nothing(pools):
    here, _ = pools
    addrs = here.alloc_mem(2, holder=A)
    with pytest.raises(ValueError, match="transfer to instance 1: expected another"):
        here.transfer(1, addrs)
    with pytest.raises(ValueError, match="expected transfer_with_insert"):
        here.transfer(2, addrs, flags=TransferOptions(insert=True))
    with pytest.raises(ValueError, match="2 blocks for 3 tokens"):
        here.transfer_with_insert(2, [1, 2, 3], addrs)
    with pytest.raises(ValueError, match="expected each once"):
        here.transfer(2, addrs[[0, 0]])
    for medium in (5, True, Placement.MIXED):
        with pytest.raises(ValueError, match=f"medium={medium!r}: expected"):
            here.transfer(2, addrs, flags=TransferOptions(medium=medium))
    with pytest.raises(ValueError, match="medium=5: expected"):
        here.alloc_mem(1, 5, instance=2, holder=A)
    with pytest.raises(ValueError, match="expected int64"):
        here.transfer(2, addrs, [0.5, 1.5])
    with pytest.raises(ValueError, match="connected already"):
        here.connect(InProcess(LinkModel(0.0, 1.0)), ByRequest(DiscreteLayout(), GEOMETRY), Timeouts(1, 1, 1))
    here.free_mem(addrs, holder=A)
    with pytest.raises(StaleAddress):
        here.transfer(2, addrs)
    free = here.addresses(np.array([5], dtype=np.int32))
    with pytest.raises(NotHeld):
        here.transfer(2, free)
    assert here.transfers.num_open == 0 and here.stats().num_free == 8


def test_a_granularity_of_other_blocks_is_refused():
    other = CacheGeometry(2, 8, 1, 2, torch.float32)
    for granularity in (ByRequest(AggregatedLayout(), GEOMETRY), ByRequest(DiscreteLayout(), other)):
        with pytest.raises(ValueError, match="granularity for .*: expected discrete, .*block_size=4"):
            make_pool().connect(InProcess(LinkModel(0.0, 1.0)), granularity, Timeouts(1, 1, 1))


@pytest.mark.parametrize("name", ["deadline_ns", "patience_ns", "retry_ns"])
@pytest.mark.parametrize("value", [0, -1, True, 1e9, float("nan"), float("inf"), 10**18 + 1, "1", None])
def test_timeouts_are_whole_nanoseconds_within_what_a_clock_can_say(name, value):
    good = {"deadline_ns": 1, "patience_ns": 10**18, "retry_ns": np.int32(5)}
    assert type(Timeouts(**good).retry_ns) is int
    with pytest.raises(ValueError, match=rf"{name}={value!r}: expected an integer in \[1, "):
        Timeouts(**(good | {name: value}))


@pytest.mark.parametrize("value", [-1, True, 1.0, float("nan"), 9, "1", None])
def test_a_headroom_that_is_no_number_of_the_pool_s_blocks_is_refused_and_connects_nothing(value):
    transport, pool = InProcess(LinkModel(0.0, 1.0)), make_pool()
    with pytest.raises(ValueError, match=rf"headroom_blocks={value!r}: expected an integer in \[0, 8\]"):
        pool.connect(transport, ByRequest(DiscreteLayout(), GEOMETRY), Timeouts(1, 1, 1), headroom_blocks=value)
    pool.connect(transport, ByRequest(DiscreteLayout(), GEOMETRY), Timeouts(1, 1, 1), headroom_blocks=8)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"transport": None}, "transport=None: expected a Transport"),
        ({"timeouts": 60}, "timeouts=60: expected a Timeouts"),
    ],
)
def test_what_is_no_transport_and_no_timeouts_is_refused_and_connects_nothing(given, named):
    pool = make_pool()
    good = {"transport": InProcess(LinkModel(0.0, 1.0)), "timeouts": Timeouts(1, 1, 1)}
    good["granularity"] = ByRequest(DiscreteLayout(), GEOMETRY)
    with pytest.raises(ValueError, match=named):
        pool.connect(**(good | given))
    pool.connect(**good)


def test_who_inherits_an_arrival_may_hold_its_prefix_and_inherits_once(pools):
    here, there = pools
    tokens = list(range(8))
    there.insert(tokens[:4], there.alloc_mem(1, holder=B), holder=B)
    here.transfer_with_insert(2, tokens, here.alloc_mem(2, holder=A))
    play(pools)
    (arrival,) = there.transfers.drain_arrivals()
    there.transfers.settle(arrival, B)
    assert there.blocks.allocator.held_by(B).tolist() == there.resolve(there.match(tokens).addrs).tolist()
    with pytest.raises(ValueError, match="expected one that was not settled before"):
        there.transfers.settle(arrival, B)
    there.check()


def test_room_for_blocks_of_another_shape_is_refused_before_anything_is_written():
    transport = InProcess(LinkModel(latency_s=1e-6, gb_per_s=1.0))
    made = [make_pool(incarnation=1), make_pool(incarnation=2, layout=AggregatedLayout())]
    for pool in made:
        pool.connect(transport, ByRequest(pool.layout, GEOMETRY), Timeouts(10**9, 10**9, 10**8))
    ticket = made[0].alloc_mem(1, instance=2, holder=A)
    assert play(made) == [ticket] and ticket.reason == "layout='discrete': the receiver has layout='aggregated'"
    assert made[1].stats().num_free == 8


def test_what_is_reserved_in_dram_may_be_more_than_hbm_has():
    transport = InProcess(LinkModel(latency_s=1e-6, gb_per_s=1.0))
    made = [make_pool(incarnation=1), make_pool(2, num_dram_blocks=4, incarnation=2)]
    for pool in made:
        pool.connect(transport, ByRequest(pool.layout, GEOMETRY), Timeouts(10**9, 10**9, 10**8))
    room = reserved(made, 4, Medium.DRAM)
    ticket = made[0].transfer(2, made[0].alloc_mem(4, holder=A), room.addrs)
    assert play(made) == [ticket] and ticket.state is TicketState.DONE


def test_addresses_may_be_lists_and_what_was_inserted_there_is_written_once(pools):
    here, _ = pools
    room, addrs = reserved(pools, 1), here.alloc_mem(1, holder=A)
    ticket = here.transfer_with_insert(2, list(range(4)), addrs.tolist(), room.addrs.tolist())
    assert play(pools) == [ticket] and ticket.state is TicketState.DONE
    with pytest.raises(ValueError, match="expected none that a transfer_with_insert has gone to"):
        here.transfer(2, addrs, room.addrs)
    here.free_mem(room.addrs.tolist(), holder=A)


def test_a_pool_that_is_connected_to_no_other_says_so():
    pool = MemPool(GEOMETRY, DiscreteLayout(), 2, RadixIndex)
    with pytest.raises(ValueError, match="connected to no other"):
        pool.transfer(2, pool.alloc_mem(1, holder=A))


def reserved(pools, num_blocks, medium=Medium.HBM, holder=A):
    here, _ = pools
    ticket = here.alloc_mem(num_blocks, medium, instance=2, holder=holder)
    assert play(pools) == [ticket]
    return ticket


@pytest.mark.parametrize("medium", list(Medium))
def test_blocks_allocated_on_another_instance_are_written_without_asking_again(pools, medium):
    here, there = pools
    ticket = reserved(pools, 3, medium)
    assert ticket.state is TicketState.DONE and len(ticket.addrs) == 3
    assert (address.incarnation_of(ticket.addrs) == 2).all() and (address.medium_of(ticket.addrs) == medium).all()
    addrs = here.alloc_mem(3, holder=A)
    sent = here.transfer_with_insert(2, list(range(12)), addrs, ticket.addrs, flags=TransferOptions(on_demand=False))
    assert here.transfers.counts.calls > 0, "it waits for nobody"
    assert play(pools) == [sent] and sent.state is TicketState.DONE
    there.transfers.settle(there.transfers.drain_arrivals()[0])
    assert there.match(list(range(12))).addrs.tolist() == ticket.addrs.tolist() == sent.addrs.tolist()
    kv = there.kv if medium is Medium.HBM else there.dram.kv
    numbers = address.block_of(ticket.addrs).tolist()
    assert torch.equal(kv[:, :, numbers], here.kv[:, :, here.resolve(addrs)])
    assert there.explain(int(ticket.addrs[0])).holders == (("index",), ("remote", 1, 1))
    here.free_mem(ticket.addrs, holder=A)
    play(pools)
    assert there.explain(int(ticket.addrs[0])).holders == (("index",),)
    assert here.transfers.num_open == there.transfers.num_open == 0


def test_addresses_that_were_inserted_elsewhere_are_written_no_second_time(pools):
    here, there = pools
    addrs, other = reserved(pools, 3).addrs, here.alloc_mem(2, holder=A)
    here.transfer_with_insert(2, list(range(8)), here.alloc_mem(2, holder=A), addrs[:2])
    for late in (False, True):
        with pytest.raises(ValueError, match="expected none that a transfer_with_insert has gone to"):
            here.transfer(2, other, addrs[1:])
        with pytest.raises(ValueError, match="expected none that a transfer_with_insert has gone to"):
            here.transfer_with_insert(2, list(range(50, 58)), other, addrs[:2])
        assert late or play(pools)
    assert here.transfer(2, other[:1], addrs[2:]) in play(pools)
    assert there.match(list(range(8))).num_tokens == 8


def test_addresses_elsewhere_are_given_up_in_parts_and_used_no_more(pools):
    here, there = pools
    addrs = reserved(pools, 4).addrs
    here.free_mem(addrs[1:3], holder=A)
    play(pools)
    assert there.stats().num_free == 6
    mine = here.alloc_mem(2, holder=A)
    with pytest.raises(StaleAddress, match="addresses on instance 2"):
        here.transfer(2, mine, addrs[:2])
    with pytest.raises(StaleAddress, match="reserved by"):
        here.free_mem(addrs[1:2], holder=A)
    with pytest.raises(StaleAddress, match="reserved by"):
        here.free_mem(addrs[:1], holder=("request", "b", 0))
    ticket = here.transfer(2, mine, addrs[[0, 3]])
    with pytest.raises(ValueError, match="a transfer that has not ended writes there"):
        here.free_mem(addrs[:1], holder=A)
    play(pools)
    assert ticket.state is TicketState.DONE
    here.free_mem(addrs[[0, 3]], holder=A)
    there.transfers.settle(there.transfers.drain_arrivals()[0])
    play(pools)
    assert there.stats().num_free == 8
    there.check(), here.check()


def test_what_another_instance_cannot_allocate_fails_by_name(pools):
    ticket = reserved(pools, 9)
    assert ticket.state is TicketState.FAILED and ticket.refused
    assert "9 blocks in HBM asked for by ('remote', 1, 1)" in ticket.reason
    assert pools[1].stats().num_free == 8 and pools[0].transfers.num_open == 0


@pytest.mark.parametrize("kind", ["Reserve", "Reserved", "Release", "Released"])
@pytest.mark.parametrize("fault", ["lost", "twice", "late"])
def test_reservations_survive_messages_that_are_lost_repeated_or_late(pools, kind, fault):
    here, there = pools
    ticket = here.alloc_mem(3, instance=2, holder=A)
    ended = play(pools, fault=(kind, fault), until_ns=10**9, step_ns=10**7)
    assert ended == [ticket] and ticket.state is TicketState.DONE and there.stats().num_free == 5
    here.free_mem(ticket.addrs, holder=A)
    play(pools, fault=(kind, fault), until_ns=10**9, step_ns=10**7)
    assert there.stats().num_free == 8
    assert here.transfers.num_open == there.transfers.num_open == 0


def test_a_reservation_nobody_answers_fails_and_what_was_granted_meanwhile_comes_back(pools):
    here, there = pools
    ticket = here.alloc_mem(3, instance=2, holder=A)
    play(pools, lose=lambda message: type(message).__name__ == "Reserved", until_ns=2 * 10**9, step_ns=10**7)
    assert ticket.state is TicketState.FAILED and "within its patience, 1 s" in ticket.reason
    assert there.stats().num_free == 8 and here.transfers.num_open == 0


def test_a_reservation_of_nothing_is_done_and_leaves_nothing_behind(pools):
    here, _ = pools
    ticket = reserved(pools, 0)
    assert ticket.state is TicketState.DONE and ticket.addrs.shape == (0,) and ticket.addrs.dtype == np.int64
    here.free_mem(ticket.addrs, holder=A)
    for pool in pools:
        books = vars(pool.transfers._reservations)
        assert not any(books[name] for name in ("_wanted", "_owned", "_freed", "_hosted"))


def test_a_reservation_that_was_refused_is_not_granted_to_a_repeat_that_nobody_waits_for(pools):
    here, there = pools
    full = there.alloc_mem(8, holder=B)
    ticket = here.alloc_mem(2, instance=2, holder=A)
    here.poll(10**8)
    (_, first), (_, repeat) = here.transfers.drain_outbox()
    there.transfers.receive(1, first, 0)
    ((_, refusal),) = there.transfers.drain_outbox()
    there.free_mem(full, holder=B)
    there.transfers.receive(1, repeat, 0)
    there.transfers.drain_outbox()  # is lost: the refusal ends the ticket, so that nothing is asked for again
    here.transfers.receive(2, refusal, 0)
    assert play(pools) == [ticket] and ticket.refused and there.stats().num_free == 8


def test_addresses_elsewhere_are_written_by_one_transfer_at_a_time(pools):
    here, _ = pools
    room, mine = reserved(pools, 2), here.alloc_mem(2, holder=A)
    first = here.transfer(2, mine, room.addrs)
    with pytest.raises(ValueError, match="dst_addrs on instance 2: a transfer that has not ended writes there"):
        here.transfer_with_insert(2, list(range(4)), mine[:1], room.addrs[1:])
    assert play(pools) == [first]
    assert here.transfer_with_insert(2, list(range(4)), mine[:1], room.addrs[1:]) in play(pools)


def test_a_transfer_that_was_refused_leaves_its_addresses_as_they_were(pools):
    here, _ = pools
    room, free = reserved(pools, 1), here.addresses(np.array([5], dtype=np.int32))
    with pytest.raises(NotHeld):
        here.transfer_with_insert(2, list(range(4)), free, room.addrs)
    ticket = here.transfer(2, here.alloc_mem(1, holder=A), room.addrs)
    assert play(pools) == [ticket] and ticket.state is TicketState.DONE


@pytest.mark.parametrize("dead", [1, 2])
def test_a_reservation_ends_with_either_of_its_instances(pools, dead):
    here, there = pools
    addrs = reserved(pools, 3).addrs
    survivor, mine = there if dead == 1 else here, here.alloc_mem(3, holder=A)
    survivor.transfers.peer_gone(dead, 0)
    if survivor is there:
        assert there.stats().num_free == 8
    else:
        for call in (lambda: here.transfer(2, mine, addrs), lambda: here.alloc_mem(1, instance=2, holder=A)):
            with pytest.raises(ValueError, match="instance=2: expected one that is connected"):
                call()
        with pytest.raises(StaleAddress):
            here.free_mem(addrs, holder=A)
    survivor.check()


def test_bad_words_about_other_instances_are_refused_by_name(pools):
    here, _ = pools
    mine = here.alloc_mem(2, holder=A)
    for call in (
        lambda: here.transfer(7, mine),
        lambda: here.transfer_with_insert(7, list(range(8)), mine),
        lambda: here.alloc_mem(1, instance=7, holder=A),
    ):
        with pytest.raises(ValueError, match="instance=7: expected one that is connected to this pool, 1"):
            call()
    with pytest.raises(ValueError, match=r"medium=mixed on instance 2"):
        here.alloc_mem(1, Placement.MIXED, instance=2, holder=A)
    with pytest.raises(ValueError, match=r"dst_addrs=None: expected addresses, or flags.on_demand"):
        here.transfer(2, mine, flags=TransferOptions(on_demand=False))
    with pytest.raises(ValueError, match="1 dst_addrs for 2 blocks"):
        here.transfer(2, mine, reserved(pools, 1).addrs)
    with pytest.raises(StaleAddress):
        here.transfer(2, mine, mine)
    assert here.alloc_mem(1, instance=1, holder=A).dtype == np.int64, "here is an instance too"
    here.check()


@pytest.mark.parametrize("instance", [2.0, True, "2", None, -2])
def test_an_instance_that_is_no_number_is_refused_by_name_and_nothing_is_said(pools, instance):
    here, _ = pools
    addrs = here.alloc_mem(1, holder=A)
    with pytest.raises(ValueError, match=f"instance={instance!r}: expected an integer >= 0"):
        here.transfer(instance, addrs)
    assert not here.transfers.drain_outbox() and here.transfers.num_open == 0


def test_private_data_that_no_wire_could_carry_is_refused_by_name(pools):
    here, _ = pools
    addrs = here.alloc_mem(1, holder=A)
    for private in ("text", None, bytearray(b"x")):
        with pytest.raises(ValueError, match="private=.*: expected bytes"):
            here.transfer(2, addrs, private=private)
    assert not here.transfers.drain_outbox() and here.transfers.num_open == 0
