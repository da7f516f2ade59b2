"""Allocator: who holds a block, and when it is free again."""

import numpy as np
import pytest

from memserve.kvcache import INDEX, Allocator, Medium, NotHeld, OutOfBlocks

A, B = ("request", "a", 0), ("request", "b", 0)


def test_alloc_gives_exactly_n_neighbours_or_nothing():
    allocator = Allocator(4)
    assert allocator.alloc(3, A).tolist() == [0, 1, 2]
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 4 free"):
        allocator.alloc(2, B)
    assert allocator.num_free == 1
    allocator.check()


def test_a_block_lives_until_its_last_holder_lets_go():
    allocator = Allocator(4)
    blocks = allocator.alloc(2, A)
    allocator.retain(blocks, B)
    allocator.release(blocks, A)
    assert allocator.num_free == 2 and allocator.holders_of(0) == [B]
    assert allocator.release_all(B) == 2
    assert allocator.num_free == 4 and allocator.generations.tolist() == [1, 1, 0, 0]
    allocator.check()


def test_blocks_freed_together_come_back_as_neighbours():
    allocator = Allocator(8)
    allocator.alloc(4, A)
    allocator.release_all(A)
    assert allocator.alloc(4, B).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("blocks", [[0, 0], [3], [-1], [9], [0, 2]])
def test_a_wrong_release_is_refused_and_changes_nothing(blocks):
    allocator = Allocator(4)
    allocator.alloc(2, A)
    allocator.alloc(1, B)
    before = allocator.refcounts.copy()
    with pytest.raises(NotHeld):
        allocator.release(np.array(blocks, dtype=np.int32), A)
    assert (allocator.refcounts == before).all()
    allocator.check()


def test_a_double_free_is_refused():
    allocator = Allocator(4)
    blocks = allocator.alloc(2, A)
    allocator.release(blocks, A)
    with pytest.raises(NotHeld):
        allocator.release(blocks, A)
    with pytest.raises(NotHeld, match="retains free blocks"):
        allocator.retain(blocks, B)
    allocator.check()


@pytest.mark.parametrize("num_blocks", [0, -3, 1 << 26])
def test_sizes_out_of_range_are_named(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks}"):
        Allocator(num_blocks)
    with pytest.raises(ValueError, match="num_blocks=-1"):
        Allocator(4).alloc(-1, A)


def test_what_only_the_index_holds_is_counted_through_every_change():
    allocator = Allocator(4)
    blocks = allocator.alloc(3, A)
    allocator.retain(blocks, INDEX)
    assert allocator.num_index_only == 0
    allocator.release(blocks[1:], A)
    assert allocator.num_index_only == 2
    allocator.retain(blocks[2:], B)
    assert allocator.num_index_only == 1
    allocator.release(blocks[1:2], INDEX)
    assert allocator.num_index_only == 0 and allocator.num_free == 2
    assert allocator.release_all(INDEX) == 2
    allocator.check()


@pytest.mark.parametrize("medium", list(Medium))
def test_evicted_blocks_are_free_and_their_addresses_stale(medium):
    allocator = Allocator(4, 4)
    blocks = allocator.alloc(3, A, medium)
    allocator.retain(blocks, INDEX)
    allocator.release(blocks, A)
    allocator.evicted(blocks[[2, 0]])
    assert allocator.refcounts[blocks].tolist() == [0, 1, 0]
    assert allocator.generations[blocks].tolist() == [1, 0, 1]
    assert (allocator.num_free, allocator.num_free_dram) == ((3, 4) if medium is Medium.HBM else (4, 3))
    assert (allocator.num_index_only, allocator.num_index_only_dram) == ((1, 0) if medium is Medium.HBM else (0, 1))
    allocator.check()
    assert sorted(allocator.alloc(3, B, medium).tolist()) == sorted({*blocks[[0, 2]].tolist(), int(blocks[0]) + 3})
    allocator.evicted(blocks[:0])
    allocator.check()


@pytest.mark.parametrize("medium", list(Medium))
@pytest.mark.parametrize("holders", [[A], [A, INDEX], []], ids=["a request", "a request and the index", "nobody"])
def test_the_index_evicts_nothing_that_others_hold_or_nobody(medium, holders):
    allocator = Allocator(4, 4)
    blocks, other = allocator.alloc(2, INDEX, medium), allocator.alloc(1, A, medium)
    for holder in holders[1:]:
        allocator.retain(other, holder)
    if not holders:
        allocator.release(other, A)
    before = allocator.refcounts.copy(), allocator.generations.copy()
    with pytest.raises(AssertionError, match="the index evicts what others hold"):
        allocator.evicted(np.concatenate([blocks, other]))
    assert (allocator.refcounts == before[0]).all() and (allocator.generations == before[1]).all()
    allocator.check()


def test_who_has_dram_needs_no_hbm():
    allocator = Allocator(0, 2)
    assert allocator.alloc(2, A, Medium.DRAM).tolist() == [0, 1] and allocator.num_free == allocator.num_blocks == 0
    with pytest.raises(OutOfBlocks, match="1 blocks asked for, 0 of 0 free in HBM"):
        allocator.alloc(1, B)
    allocator.check()
    with pytest.raises(ValueError, match="num_blocks=0: expected 1 to"):
        Allocator(0, 0)
