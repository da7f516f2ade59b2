"""What one pool gives to a store, played by hand: one prefix at a time, as far as it is still there."""

import numpy as np
import pytest
from kvcache.transfer_pair import B, Wires

from memserve.deposits import Deposits
from memserve.kvcache import Medium
from memserve.kvcache.ticket import Arrival, TransferOptions
from memserve.sched.store_policy import NoStore, StorePolicy, WriteBack, WriteThrough, WriteThroughSelective

GIVER, STORE = 1, 2


def tokens_of(number, num_blocks=2):
    return np.arange(num_blocks * B, dtype=np.int32) + 1000 * number


class Giver:
    """A pool that gives, and a store of a few blocks in DRAM alone."""

    def __init__(self, policy=None, num_store_blocks=16, num_cached=4, max_incoming=4, **giver):
        self.wires = Wires()
        self.giver = self.wires.pool(GIVER, **giver)
        self.store = self.wires.pool(
            STORE, num_blocks=0, num_dram_blocks=num_store_blocks, max_best_effort=max_incoming
        )
        self.deposits = Deposits(self.giver.transfers, self.giver.blocks, policy or WriteThrough(), [STORE])
        for number in range(num_cached):
            blocks = self.giver.fill(2 * B, seed=number)
            self.giver.blocks.publish(tokens_of(number), blocks)
            self.giver.blocks.release(blocks, ("request", "r", 0))

    def offer(self, *numbers):
        for number in numbers:
            self.deposits.offer(tokens_of(number), self.wires.now_ns)

    def use(self, number, num_tokens=2 * B):
        """A request finds it."""
        self.giver.blocks.match(tokens_of(number), num_tokens)

    def look_ahead(self):
        self.deposits.look_ahead(self.wires.now_ns)
        self.go_on()

    @property
    def num_asks(self):
        """But for repeats."""
        return self.giver.book._num_tickets

    def go_on(self):
        """Until nothing is under way."""
        self.deliver()
        while self.giver.transfers.num_open:
            self.wires.let_time_pass()
            self.deliver()

    def deliver(self):
        self.wires.deliver()
        for arrival in self.store.transfers.drain_arrivals():
            self.store.transfers.settle(arrival)
        ended, self.wires.ended = self.wires.ended, []
        for ticket in ended:
            self.deposits.ended(ticket, self.wires.now_ns)
        self.wires.check()

    def kept(self, num_prefixes=4):
        index = self.store.blocks.index
        return {n for n in range(num_prefixes) if index.peek(tokens_of(n)).num_tokens == 2 * B}


def test_what_is_offered_lies_in_the_stores_dram_as_it_was():
    giver = Giver()
    giver.offer(0, 2)
    giver.go_on()
    assert giver.kept() == {0, 2} and giver.store.blocks.num_blocks == 0
    for number in (0, 2):
        here, there = (pool.blocks.index.peek(tokens_of(number)).blocks for pool in (giver.giver, giver.store))
        assert (giver.giver.kv(here) == giver.store.kv(there)).all()


def test_one_prefix_is_on_its_way_at_a_time_and_what_waits_holds_nothing():
    giver = Giver()
    giver.offer(0, 1, 2, 3)
    allocator = giver.giver.blocks.allocator
    assert [h for h in allocator.holders() if h != ("index",)] == [("transfer", GIVER, 1)]
    giver.giver.blocks.delete(tokens_of(2))  # while it waits
    giver.go_on()
    assert giver.kept() == {0, 1, 3} and giver.giver.transfers.counts.tokens == 6 * B
    assert giver.deposits.num_dropped == 2 * B


def test_of_more_than_may_wait_the_one_that_waits_longest_is_dropped_and_counted():
    giver = Giver(WriteThrough(max_waiting=1))
    giver.offer(0, 1, 2, 3)
    giver.go_on()
    assert giver.kept() == {0, 3} and giver.deposits.num_dropped == 4 * B


def test_what_the_store_has_is_not_sent_again():
    giver = Giver()
    giver.offer(0)
    giver.go_on()
    num_bytes = giver.giver.transfers.counts.bytes
    giver.offer(0)
    giver.go_on()
    assert giver.giver.transfers.counts.bytes == num_bytes and giver.giver.transfers.counts.failed == 0


def test_a_full_store_evicts_and_declines_what_it_can_never_hold():
    giver = Giver(num_store_blocks=4)
    giver.offer(0, 1, 2)
    giver.go_on()
    assert giver.kept() == {1, 2}
    blocks = giver.store.blocks.alloc(3, ("request", "r", 0), Medium.DRAM)
    giver.offer(3)
    giver.go_on()
    assert len(blocks) == 3 and giver.giver.transfers.counts.declined == 1
    giver.store.blocks.release_all(("request", "r", 0))
    giver.offer(3)
    giver.go_on()
    assert 3 in giver.kept()


def offer_of_another(giver):
    """It is on the wire as long as no time passes."""
    other = giver.wires.pool(3)
    options = TransferOptions(insert=True, medium=Medium.DRAM, best_effort=True)
    ticket = other.transfers.start(STORE, tokens_of(9), other.fill(2 * B, seed=9), options, b"", giver.wires.now_ns)
    giver.deliver()
    return ticket


@pytest.mark.parametrize("again", ["offer", "look_ahead"])
def test_what_a_busy_store_declines_waits_again_and_holds_nothing(again):
    giver = Giver(max_incoming=1)
    ticket = offer_of_another(giver)
    giver.offer(0)
    giver.deliver()
    assert not ticket.ended and giver.giver.transfers.counts.declined == giver.num_asks == 1
    assert [h for h in giver.giver.blocks.allocator.holders() if h != ("index",)] == []
    while not ticket.ended:
        giver.wires.let_time_pass()
        giver.deliver()
    assert giver.num_asks == 1  # it asks when there is something new, not again and again
    giver.offer(1) if again == "offer" else giver.look_ahead()
    giver.go_on()
    assert giver.kept() == ({0, 1} if again == "offer" else {0}) and giver.deposits.num_dropped == 0


def test_a_store_that_is_gone_is_offered_nothing_more():
    giver = Giver()
    giver.offer(0, 1)
    giver.giver.transfers.peer_gone(STORE, giver.wires.now_ns)
    giver.go_on()
    giver.offer(2)
    assert giver.giver.transfers.num_open == 0 and giver.deposits.num_dropped == 0
    assert [h for h in giver.giver.blocks.allocator.holders() if h != ("index",)] == []


class FirstBlock(StorePolicy):
    """The first block of each prompt."""

    def num_offered(self, uses):
        return 1


def test_a_policy_says_how_many_blocks_of_those_that_are_cached():
    giver = Giver(FirstBlock())
    giver.offer(0)
    giver.go_on()
    assert giver.store.blocks.index.peek(tokens_of(0)).num_tokens == B
    uses = np.array([3, 2, 2, 1])
    assert NoStore().num_offered(uses) == WriteBack().num_offered(uses) == 0 and WriteThrough().num_offered(uses) == 4
    assert [WriteThroughSelective(n).num_offered(uses) for n in (1, 2, 3, 4)] == [4, 3, 1, 0]
    assert [WriteBack(share).num_ahead(15) for share in (0.01, 0.1, 0.2, 1)] == [1, 2, 3, 15]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WriteThroughSelective(min_hits=0), "store.min_hits=0: expected an integer >= 1"),
        (lambda: WriteThroughSelective(max_waiting=0), "store.max_waiting=0: expected an integer >= 1"),
        (lambda: WriteBack(0), "store.ahead_share=0: expected a number above 0, up to 1"),
        (lambda: WriteBack(1.5), "store.ahead_share=1.5: expected a number above 0, up to 1"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_selective_kv_that_is_used_once_is_not_written_and_of_a_prompt_its_hot_beginning_is():
    giver = Giver(WriteThroughSelective())
    giver.offer(0, 1, 2)
    giver.go_on()
    assert giver.num_asks == 0
    giver.use(0)
    giver.use(1, B)
    giver.offer(0, 1, 2)
    giver.go_on()
    held = [giver.store.blocks.index.peek(tokens_of(number)).num_tokens for number in (0, 1, 2)]
    assert held == [2 * B, B, 0] and giver.giver.transfers.counts.tokens == 3 * B and giver.deposits.num_dropped == 0


def test_selective_what_was_given_is_offered_again_only_when_it_left_the_cache_or_there_is_more_of_it():
    giver = Giver(WriteThroughSelective())
    giver.use(0, B)
    for num_asks in (1, 1):
        giver.offer(0, 0)  # the second waits while the first is on its way
        giver.go_on()
        assert giver.num_asks == num_asks
    giver.use(0)
    giver.offer(0)
    giver.go_on()
    assert giver.num_asks == 2 and giver.giver.transfers.counts.tokens == 2 * B
    giver.giver.blocks.delete(tokens_of(0))
    giver.giver.blocks.publish(tokens_of(0), giver.giver.fill(2 * B, seed=0))
    giver.use(0)
    giver.offer(0)
    giver.go_on()
    assert giver.num_asks == 3 and giver.giver.transfers.counts.tokens == 2 * B, "the store has it still"


def test_selective_what_did_not_get_there_is_offered_again_when_it_is_used_again():
    giver = Giver(WriteThroughSelective(), num_store_blocks=4)
    giver.store.blocks.alloc(3, ("request", "r", 0), Medium.DRAM)
    giver.use(0)
    for num_declined in (1, 2):
        giver.offer(0)
        giver.go_on()
        assert giver.giver.transfers.counts.declined == num_declined
    giver.store.blocks.release_all(("request", "r", 0))
    giver.offer(0)
    giver.go_on()
    assert giver.kept() == {0}


def back(share=0.25, **options):
    """A giver of 16 blocks, of which 8 are cached: the rest is free."""
    return Giver(WriteBack(share), num_blocks=16, **options)


def test_write_back_offers_nothing_before_it_is_near_to_be_evicted():
    giver = back()
    giver.offer(0, 1, 2, 3)
    giver.look_ahead()
    giver.giver.fill(4 * B, seed=9)  # 4 blocks are free
    giver.look_ahead()
    assert giver.num_asks == 0 and giver.deposits.num_dropped == 0


def test_write_back_what_is_evicted_next_is_offered_before_it_is_and_once():
    giver = back()
    giver.use(0)  # so that 1 is the oldest
    giver.giver.fill(7 * B, seed=9)
    giver.look_ahead()
    assert giver.kept() == {1, 2} and giver.giver.blocks.allocator.num_free == 1, "3 blocks were near, and came whole"
    for _ in range(3):
        giver.offer(0)
        giver.look_ahead()
    assert giver.num_asks == 2 and giver.giver.blocks.stats().num_evicted == 0
    giver.giver.fill(5 * B, seed=9)  # takes 1, 2
    assert giver.giver.blocks.stats().num_evicted == 4 and giver.deposits.num_dropped == 0
    giver.look_ahead()
    assert giver.kept() == {0, 1, 2, 3}


def test_write_back_what_is_evicted_before_its_turn_is_counted():
    giver = back()
    giver.giver.fill(12 * B, seed=9)
    assert giver.deposits.num_dropped == 4 * B
    giver.look_ahead()
    assert giver.kept() == {2, 3} and giver.deposits.num_dropped == 4 * B


def test_write_back_what_the_store_does_not_take_keeps_nobody_from_their_turn():
    giver = back(1, num_store_blocks=2)
    other = giver.store.blocks.alloc(1, ("request", "r", 0), Medium.DRAM)
    giver.look_ahead()
    assert giver.giver.transfers.counts.declined == giver.num_asks == 4 and len(other) == 1
    giver.look_ahead()
    assert giver.num_asks == 4, "each was offered once"


def test_write_back_what_came_from_the_store_is_not_sent_there():
    giver = back(1, num_cached=1)
    blocks = giver.giver.fill(2 * B, seed=5)
    canonical = giver.giver.blocks.publish(tokens_of(5), blocks)
    arrival = Arrival((STORE, 1), tokens_of(5), canonical, 0, b"", 0, 0, 0, 0)
    giver.deposits.came(arrival)
    giver.look_ahead()
    assert giver.num_asks == 1 and giver.kept(6) == {0}


def test_write_back_under_a_dram_tier_is_of_what_leaves_the_instance_altogether():
    """What goes to DRAM is still here; it is noted there, and when it comes back, that it was offered."""
    giver = Giver(WriteBack(0.5), num_blocks=8, num_dram_blocks=8)
    giver.giver.blocks.swap_out(8)
    giver.look_ahead()
    assert giver.num_asks == 0, "8 blocks of HBM are free"
    giver.giver.fill(6 * B, seed=9)
    giver.look_ahead()
    assert giver.kept() == {0} and giver.giver.blocks.allocator.num_free == 2
    found = giver.giver.blocks.match(tokens_of(0)).blocks
    giver.giver.blocks.retain(found, ("request", "r", 0))
    swap = giver.giver.blocks.swap_in(found, ("request", "r", 0))
    assert len(swap.arrived) == 2 and (giver.giver.blocks.allocator.offered_to[swap.arrived] == STORE).all()


def test_write_back_ends_where_the_store_is_gone():
    giver = back(1)
    giver.giver.transfers.peer_gone(STORE, giver.wires.now_ns)
    giver.look_ahead()
    assert giver.giver.transfers.num_open == giver.num_asks == 0
