"""Table 1's transfer and transfer_with_insert, from one MemPool to another."""

import numpy as np
import pytest
import torch

from memserve.kvcache import CacheGeometry, DiscreteLayout, MemPool, NotHeld, RadixIndex, StaleAddress
from memserve.kvcache.granularity import ByRequest
from memserve.kvcache.ticket import TicketState, Timeouts, TransferOptions
from memserve.transfer import InProcess, LinkModel

SHAPE = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)
A = ("request", "a", 0)


@pytest.fixture
def pools():
    transport = InProcess(LinkModel(latency_s=1e-6, gb_per_s=1.0))
    made = [MemPool(SHAPE, DiscreteLayout(), 8, RadixIndex, incarnation=i) for i in (1, 2)]
    for pool in made:
        pool.connect(transport, ByRequest(DiscreteLayout(), SHAPE), Timeouts(10**9, 10**9, 10**8))
        pool.kv.copy_(torch.randn(pool.kv.shape))
    return made


def play(pools, until_ns=10**6):
    """Delivers what the pools say until then; the tickets that ended."""
    by_number, ended = {pool.incarnation: pool for pool in pools}, []
    for now_ns in range(0, until_ns, 1000):
        for pool in pools:
            ended += pool.poll(now_ns)
            for peer, message in pool.transfers.drain_outbox():
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


def test_bad_transfers_are_refused_by_name_and_hold_nothing(pools):
    here, _ = pools
    addrs = here.alloc_mem(2, holder=A)
    with pytest.raises(ValueError, match="transfer to instance 1: expected another"):
        here.transfer(1, addrs)
    with pytest.raises(ValueError, match="expected transfer_with_insert"):
        here.transfer(2, addrs, flags=TransferOptions(insert=True))
    with pytest.raises(ValueError, match="2 blocks for 3 tokens"):
        here.transfer_with_insert(2, [1, 2, 3], addrs)
    here.free_mem(addrs, holder=A)
    with pytest.raises(StaleAddress):
        here.transfer(2, addrs)
    free = here.addresses(np.array([5], dtype=np.int32))
    with pytest.raises(NotHeld):
        here.transfer(2, free)
    assert here.transfers.num_open == 0 and here.stats().num_free == 8


def test_a_pool_that_is_connected_to_no_other_says_so():
    pool = MemPool(SHAPE, DiscreteLayout(), 2, RadixIndex)
    with pytest.raises(ValueError, match="connected to no other"):
        pool.transfer(2, pool.alloc_mem(1, holder=A))
