"""What is HashIndex's own; what it answers as RadixIndex does is in test_index.py."""

import functools

import numpy as np

from memserve.kvcache import BlockPool, Medium
from memserve.kvcache.hash_index import HashIndex

A = ("request", "a", 0)


def test_a_held_tail_keeps_what_is_before_it():
    refcounts = np.array([1, 2, 1], dtype=np.int32)
    index = HashIndex(1, refcounts)
    index.insert(np.array([1, 2], dtype=np.int32), np.array([0, 1], dtype=np.int32))
    index.insert(np.array([1, 3], dtype=np.int32), np.array([0, 2], dtype=np.int32))
    assert index.evict(3).tolist() == [2]
    refcounts[1] = 1
    assert index.evict(3).tolist() == [1, 0]


def test_the_same_block_after_other_tokens_is_no_hit():
    index = HashIndex(2, np.zeros(4, dtype=np.int32))
    index.insert(np.array([1, 2, 3, 4], dtype=np.int32), np.array([0, 1], dtype=np.int32))
    assert index.peek(np.array([3, 4], dtype=np.int32)).num_tokens == 0
    assert index.match(np.array([7, 7, 3, 4], dtype=np.int32)).num_tokens == 0


def test_a_pool_evicts_through_it():
    pool = BlockPool(4, 2, functools.partial(HashIndex))
    tokens = np.arange(6, dtype=np.int32)
    pool.publish(tokens, pool.alloc(3, A))
    pool.release_all(A)
    pool.alloc(3, A)
    assert pool.match(tokens).num_tokens == 2 and pool.stats().num_evicted == 2
    pool.check()


def test_its_keys_are_the_same_in_every_process():
    index = HashIndex(2, np.zeros(4, dtype=np.int32))
    index.insert(np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32))
    assert [digest.hex() for digest in index._entries] == [
        "a8b2f5ace066b0ffd5f2150532e06618",
        "35ce1b7dc4da8ce51a7591561b3595db",
    ]


def test_it_follows_blocks_that_their_holder_moves():
    pool = BlockPool(4, 2, functools.partial(HashIndex), num_dram_blocks=2)
    tokens = np.arange(4, dtype=np.int32)
    pool.publish(tokens, pool.alloc(2, A, Medium.DRAM))
    pool.swap_in(pool.match(tokens).blocks, A)
    pool.wait()
    assert (pool.match(tokens).blocks < 4).all() and pool.stats().num_free_dram == 2
    pool.check()
