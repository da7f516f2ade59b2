"""MemPool over two media: what moves down and up, what the index says of it, and where blocks are allocated."""

import numpy as np
import pytest
from kvcache.small_pools import A, B, contents, filled_pool, make_pool

from memserve.kvcache import (
    NotHeld,
    OutOfBlocks,
    StaleAddress,
    address,
)
from memserve.kvcache.address import Medium
from memserve.kvcache.mempool import Placement


def test_swap_out_moves_the_coldest_and_the_index_follows():
    pool, tokens, addrs = filled_pool()
    moved = pool.swap_out(2).addrs
    assert contents(pool, moved) == [4, 3] and (address.medium_of(moved) == Medium.DRAM).all()
    found = pool.match(tokens)
    assert found.num_tokens == 16 and contents(pool, found.addrs) == [1, 2, 3, 4]
    assert address.medium_of(found.addrs).tolist() == [0, 0, 1, 1]
    with pytest.raises(StaleAddress):
        pool.retain(addrs[2:], holder=B)
    assert pool.stats().num_free == 2 and pool.stats().num_swapped_out == 2
    pool.check()


def test_swap_in_brings_back_what_its_holder_holds():
    pool, tokens, _ = filled_pool()
    pool.swap_out(3)
    found = pool.match(tokens).addrs
    with pytest.raises(NotHeld):
        pool.swap_in(found, holder=A)
    pool.retain(found, holder=A)
    here = pool.swap_in(found, holder=A).addrs
    assert (address.medium_of(here) == Medium.HBM).all() and contents(pool, here) == [1, 2, 3, 4]
    assert pool.match(tokens).addrs.tolist() == here.tolist() and pool.stats().num_free_dram == 4
    pool.check()


def test_alloc_moves_cached_blocks_down_before_it_evicts_any():
    pool, tokens, _ = filled_pool(num_dram_blocks=3)
    pool.alloc_mem(3, holder=B)
    assert pool.match(tokens).num_tokens == 16 and pool.stats().num_evicted == 0
    pool.alloc_mem(1, holder=B)
    assert pool.match(tokens).num_tokens == 12 and pool.stats().num_evicted == 1
    with pytest.raises(OutOfBlocks, match="1 blocks in HBM asked for"):
        pool.alloc_mem(1, holder=B)
    pool.check()


def test_a_block_in_use_never_moves():
    pool, tokens, addrs = filled_pool()
    pool.retain(addrs[:3], holder=B)
    assert len(pool.swap_out(4).addrs) == 1
    assert pool.match(tokens).addrs[:3].tolist() == addrs[:3].tolist()
    pool.check()


def test_dram_can_be_allocated_by_name_and_has_its_own_end():
    pool, _, _ = filled_pool(num_dram_blocks=2)
    addrs = pool.alloc_mem(2, Medium.DRAM, holder=B)
    assert (address.medium_of(addrs) == Medium.DRAM).all()
    with pytest.raises(OutOfBlocks, match="in DRAM"):
        pool.alloc_mem(1, Medium.DRAM, holder=B)
    pool.free_mem(addrs, holder=B)
    with pytest.raises(ValueError, match="7"):
        pool.alloc_mem(1, 7, holder=B)
    assert make_pool().swap_out(3).addrs.tolist() == []


def test_mixed_takes_hbm_first_then_dram_and_all_or_nothing():
    pool = make_pool(3, num_dram_blocks=2)
    pool.alloc_mem(1, holder=A)
    addrs = pool.alloc_mem(3, Placement.MIXED, holder=B)
    assert address.medium_of(addrs).tolist() == [Medium.HBM, Medium.HBM, Medium.DRAM]
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(2, Placement.MIXED, holder=B)
    assert pool.stats().num_free_dram == 1 and len(pool.blocks.allocator.held_by(B)) == 3
    pool.free_mem(addrs, holder=B)
    assert pool.alloc_mem(4, "mixed", holder=B).shape == (4,)
    pool.check()


def test_mixed_evicts_only_when_both_media_are_full():
    pool, tokens, _ = filled_pool(num_blocks=4, num_dram_blocks=2)
    pool.alloc_mem(2, Placement.MIXED, holder=B)
    assert pool.match(tokens).num_tokens == 16
    pool.alloc_mem(1, Placement.MIXED, holder=B)
    assert pool.match(tokens).num_tokens == 12
    pool.check()


def test_room_in_dram_costs_nothing_that_hbm_caches():
    pool, tokens, _ = filled_pool(num_dram_blocks=2)
    pool.swap_out(2)
    others = np.arange(100, 108, dtype=np.int32)
    pool.insert(others, pool.alloc_mem(2, holder=B), holder=B)
    pool.blocks.release_all(B)
    pool.match(tokens)  # what lies in HBM alone is the coldest now
    pool.alloc_mem(2, Medium.DRAM, holder=B)
    assert pool.match(others).num_tokens == 8 and pool.match(tokens).num_tokens == 8
    pool.check()


def test_dram_blocks_below_others_go_with_those():
    pool, tokens, _ = filled_pool(num_blocks=2, num_dram_blocks=1)
    pool.swap_out(1)
    longer = np.arange(12, dtype=np.int32)
    addrs = np.concatenate([pool.match(tokens).addrs, pool.alloc_mem(1, holder=B)])
    pool.retain(addrs[:2], holder=B)
    pool.insert(longer, addrs, holder=B)
    pool.blocks.release_all(B)
    assert address.medium_of(pool.match(longer).addrs).tolist() == [0, 1, 0]
    pool.alloc_mem(1, Medium.DRAM, holder=B)
    assert pool.match(longer).num_tokens == 4 and pool.stats().num_free == 1
    pool.check()


def test_mixed_falls_back_on_hbm_where_what_dram_caches_lies_above_blocks_in_use():
    pool, tokens, _ = filled_pool(num_dram_blocks=2)
    pool.swap_out(2)
    longer = np.concatenate([pool.match(tokens).addrs, pool.alloc_mem(1, holder=B)])
    pool.retain(longer[:4], holder=B)
    pool.insert(np.arange(20, dtype=np.int32), longer, holder=B)
    pool.free_mem(longer[:4], holder=B)
    others = pool.alloc_mem(1, holder=A)
    pool.insert(np.arange(100, 104, dtype=np.int32), others, holder=A)
    pool.free_mem(others, holder=A)
    assert address.medium_of(pool.alloc_mem(1, Placement.MIXED, holder=A)).tolist() == [Medium.HBM]
    assert pool.match(np.arange(20, dtype=np.int32)).num_tokens == 20
    pool.check()


def test_a_pool_says_what_fits():
    assert make_pool().describe() == "8 blocks of 4 tokens = 32 tokens, 1.00 KiB in HBM; 0 in DRAM"
    assert filled_pool()[0].describe().endswith("; 4 blocks of 4 tokens = 16 tokens, 512 bytes in DRAM")
