"""An address that no longer names its block is refused by every call that takes addresses, and changes nothing."""

import inspect

import numpy as np
import pytest
import torch

from memserve.kvcache import CacheGeometry, DiscreteLayout, Medium, MemPool, RadixIndex, StaleAddress, address
from memserve.kvcache.granularity import ByRequest
from memserve.kvcache.ticket import Timeouts
from memserve.transfer import InProcess, LinkModel

A, B = ("request", "a", 0), ("request", "b", 0)
SHAPE = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)
HERE, THERE = 3, 4  # instances
media = pytest.mark.parametrize("medium", list(Medium), ids=lambda medium: medium.name)


@pytest.fixture
def pools():
    """Instance -> pool, of two that are connected."""
    transport = InProcess(LinkModel(latency_s=1e-6, gb_per_s=1.0))
    made = {i: MemPool(SHAPE, DiscreteLayout(), 8, RadixIndex, num_dram_blocks=6, incarnation=i) for i in (HERE, THERE)}
    for pool in made.values():
        pool.connect(transport, ByRequest(DiscreteLayout(), SHAPE), Timeouts(10**9, 10**9, 10**8))
    return made


def deliver(pools):
    for sender, pool in [*pools.items()] * 2:
        for peer, message in pool.transfers.drain_outbox():
            pools[peer].transfers.receive(sender, message, 0)


def tokens_of(addrs):
    return np.arange(SHAPE.block_size * len(addrs), dtype=np.int32)


def freed(pool, medium):
    addrs = pool.alloc_mem(1, medium, holder=B)
    pool.free_mem(addrs, holder=B)
    return addrs


def freed_and_in_use_again(pool, medium):
    addrs = freed(pool, medium)
    assert pool.resolve(pool.alloc_mem(1, medium, holder=B)) == address.block_of(addrs) + 8 * (medium is Medium.DRAM)
    return addrs


def moved_to_the_other_medium(pool, medium):
    """Where a cached block lay before it was swapped."""
    addrs = pool.alloc_mem(1, Medium.HBM, holder=B)
    pool.insert(tokens_of(addrs), addrs, holder=B)
    pool.free_mem(addrs, holder=B)
    below = pool.swap_out(1).addrs
    if medium is Medium.HBM:
        return addrs
    pool.retain(below, holder=B)
    pool.swap_in(below, holder=B)
    return below


def evicted(pool, medium):
    addrs = pool.alloc_mem(1, medium, holder=B)
    pool.insert(tokens_of(addrs), addrs, holder=B)
    pool.free_mem(addrs, holder=B)
    pool.blocks.clear()
    return addrs


def of_another_instance(pool, medium):
    return address.encode(address.head(THERE, medium), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


def of_a_larger_pool(pool, medium):
    return address.encode(address.head(HERE, medium), np.zeros(1, dtype=np.int64), np.full(1, 1000, dtype=np.int64))


STALE = [freed, freed_and_in_use_again, moved_to_the_other_medium, evicted, of_another_instance, of_a_larger_pool]
CALLS = {
    "free_mem": lambda pool, addrs: pool.free_mem(addrs, holder=A),
    "insert": lambda pool, addrs: pool.insert(tokens_of(addrs), addrs, holder=A),
    "retain": lambda pool, addrs: pool.retain(addrs, holder=B),
    "swap_in": lambda pool, addrs: pool.swap_in(addrs, holder=A),
    "transfer": lambda pool, addrs: pool.transfer(THERE, addrs),
    "transfer_with_insert": lambda pool, addrs: pool.transfer_with_insert(THERE, tokens_of(addrs), addrs),
    "resolve": lambda pool, addrs: pool.resolve(addrs),
}


def books(pool):
    """Everything that a call could have changed."""
    allocator = pool.blocks.allocator
    return (
        {holder: allocator.held_by(holder).tolist() for holder in allocator.holders()},
        allocator.generations.tolist(),
        [(tokens.tolist(), blocks.tolist()) for tokens, blocks in pool.blocks.index.iter_prefixes()],
        pool.stats(),
        pool.transfers.num_open,
    )


def assert_refused(pools, call):
    before = [books(pool) for pool in pools.values()]
    with pytest.raises(StaleAddress):
        call()
    deliver(pools)
    assert [books(pool) for pool in pools.values()] == before
    for pool in pools.values():
        pool.check()


def test_these_are_all_the_calls_that_take_addresses():
    """`explain` takes one too, and answers that it is stale."""
    found = {
        name
        for name, method in inspect.getmembers(MemPool, inspect.isfunction)
        if not name.startswith("_") and any("addr" in parameter for parameter in inspect.signature(method).parameters)
    }
    assert found == {*CALLS, "explain"}


@media
@pytest.mark.parametrize("stale", STALE, ids=lambda stale: stale.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_a_stale_address_is_refused_alone_and_among_good_ones_and_changes_nothing(pools, medium, stale, call):
    pool = pools[HERE]
    good = pool.alloc_mem(2, medium, holder=A)
    bad = stale(pool, medium)
    for addrs in (bad, np.concatenate([good, bad]), np.concatenate([bad, good])):
        assert_refused(pools, lambda addrs=addrs: CALLS[call](pool, addrs))
    assert pool.explain(int(bad[0])).state in ("stale", "not of this pool")


def given_up(pools, medium):
    addrs = reserved(pools, medium)
    pools[HERE].free_mem(addrs, holder=A)
    deliver(pools)
    return addrs


def of_this_pool(pools, medium):
    return pools[HERE].alloc_mem(1, medium, holder=A)


def of_its_owner(pools, medium):
    return pools[THERE].alloc_mem(1, medium, holder=A)


def reserved(pools, medium):
    ticket = pools[HERE].alloc_mem(1, medium, instance=THERE, holder=A)
    deliver(pools)
    assert len(ticket.addrs) == 1
    return ticket.addrs


@media
@pytest.mark.parametrize("stale", [given_up, of_this_pool, of_its_owner], ids=lambda stale: stale.__name__)
@pytest.mark.parametrize("inserts", [False, True])
def test_nobody_writes_to_addresses_that_are_not_reserved_there(pools, medium, stale, inserts):
    pool = pools[HERE]
    bad, good, source = stale(pools, medium), reserved(pools, medium), pool.alloc_mem(2, holder=A)
    pool.poll(0)  # of reservations that ended
    for dst_addrs in (np.concatenate([good, bad]), np.concatenate([bad, good])):
        if inserts:
            tokens = tokens_of(source)
            assert_refused(pools, lambda dst=dst_addrs, t=tokens: pool.transfer_with_insert(THERE, t, source, dst))
        else:
            assert_refused(pools, lambda dst=dst_addrs: pool.transfer(THERE, source, dst))
