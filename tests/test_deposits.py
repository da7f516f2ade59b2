"""What one pool gives to a store, played by hand: one prefix at a time, as far as it is still there."""

import numpy as np
from kvcache.transfer_pair import B, Wires

from memserve.deposits import Deposits
from memserve.kvcache import Medium
from memserve.sched.store_policy import NoStore, StorePolicy, WriteThrough

GIVER, STORE = 1, 2


def tokens_of(number, num_blocks=2):
    return np.arange(num_blocks * B, dtype=np.int32) + 1000 * number


class Giver:
    """A pool that gives, and a store of a few blocks in DRAM alone."""

    def __init__(self, policy=None, num_store_blocks=16, num_cached=4):
        self.wires = Wires()
        self.giver = self.wires.pool(GIVER)
        self.store = self.wires.pool(STORE, num_blocks=0, num_dram_blocks=num_store_blocks)
        self.deposits = Deposits(self.giver.transfers, self.giver.blocks, policy or WriteThrough(), STORE)
        for number in range(num_cached):
            blocks = self.giver.fill(2 * B, seed=number)
            self.giver.blocks.publish(tokens_of(number), blocks)
            self.giver.blocks.release(blocks, ("request", "r", 0))

    def offer(self, *numbers):
        for number in numbers:
            self.deposits.offer(tokens_of(number), self.wires.now_ns)

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


def test_a_store_that_is_gone_is_offered_nothing_more():
    giver = Giver()
    giver.offer(0, 1)
    giver.giver.transfers.peer_gone(STORE, giver.wires.now_ns)
    giver.go_on()
    giver.offer(2)
    assert giver.giver.transfers.num_open == 0 and giver.deposits.num_dropped == 0
    assert [h for h in giver.giver.blocks.allocator.holders() if h != ("index",)] == []


class FirstBlock(StorePolicy):
    """The first block and a bit, of which whole blocks count."""

    def num_offered(self, num_tokens):
        return B + 1


def test_a_policy_says_how_much_and_whole_blocks_go():
    giver = Giver(FirstBlock())
    giver.offer(0)
    giver.go_on()
    assert giver.store.blocks.index.peek(tokens_of(0)).num_tokens == B
    assert NoStore().num_offered(100) == 0 and WriteThrough().num_offered(100) == 100
