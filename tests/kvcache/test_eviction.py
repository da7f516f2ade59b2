"""Eviction orders on the tree: ties, inner nodes, splits; each one's own first is in test_index.py."""

import numpy as np
import pytest

from memserve.kvcache import BlockPool, HashIndex, RadixIndex
from memserve.kvcache.eviction import FIFO, LFU, LRU, CostAware, Eviction


def tokens(*values):
    return np.array(values, dtype=np.int32)


def index_of(policy, *prompts):
    """One block a token; block numbers in order of insertion."""
    index = RadixIndex(1, np.ones(1000, dtype=np.int32), policy)
    for prompt in prompts:
        num_new = len(prompt) - index.peek(prompt).num_tokens
        index.insert(prompt, np.arange(index.num_blocks - len(prompt) + num_new, index.num_blocks + num_new))
    return index


def test_lfu_breaks_ties_by_age():
    index = index_of(LFU(), tokens(1), tokens(2))
    index.match(tokens(2))
    index.match(tokens(1))
    assert index.evict(2).tolist() == [1, 0]


def test_a_policy_that_prefers_old_nodes_still_frees_leaves_only():
    index = index_of(FIFO(), tokens(1, 2), tokens(9), tokens(1, 2, 3))
    assert index.evict(4).tolist() == [2, 3, 1, 0]


def test_cost_aware_keeps_what_is_deep_a_while_longer_and_not_forever():
    deep = np.arange(64, dtype=np.int32)
    for horizon, first in [(1, 63), (100, 65)]:
        index = index_of(CostAware(attention_tokens=1, horizon=horizon), deep, tokens(500, 501))
        index.match(deep[:-1])  # the last block of `deep` is a node of its own, 63 tokens down
        for _ in range(30):
            index.match(tokens(500, 501))
        assert index.evict(1).tolist() == [first]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_cost_aware_refuses_values_out_of_range(value):
    with pytest.raises(ValueError, match=r"eviction\.horizon"):
        CostAware(horizon=value)
    with pytest.raises(ValueError, match=r"eviction\.attention_tokens"):
        CostAware(attention_tokens=value)


def test_splitting_a_node_keeps_its_place_and_its_depth():
    index = index_of(LRU(), tokens(1, 2, 3, 4))
    index.match(tokens(1, 2))
    [head] = index._tree.root.children.values()
    [tail] = head.children.values()
    assert (head.num_tokens_before, tail.num_tokens_before, head.born, tail.born) == (0, 2, 1, 1)
    assert tail.last_used == 1 and head.last_used == 2


NUM_HBM, NUM_BLOCKS = 10, 20


def split_by_a_match(index, first_block):
    """Three prompts, [block number, ...] of each from first_block on; the first is split after two of its blocks."""
    long, other, rare = tokens(1, 2, 3, 4), tokens(8, 9), tokens(7)
    for prompt in (long, other, rare):
        blocks = np.arange(len(prompt), dtype=np.int32) + first_block + index.num_blocks
        index.insert(prompt, blocks)
    for prompt in (long, long, other, other, other, rare, long[:2], long[:2]):
        index.match(prompt)


@pytest.mark.parametrize("first_block", [0, NUM_HBM], ids=["HBM", "DRAM"])
def test_lfu_counts_the_uses_of_head_and_tail_apart_from_their_split_on(first_block):
    index = RadixIndex(1, np.ones(NUM_BLOCKS, dtype=np.int32), LFU(), NUM_HBM)
    split_by_a_match(index, first_block)
    head, other, rare = index._tree.root.children.values()
    [tail] = head.children.values()
    assert [node.num_uses for node in (head, tail, other, rare)] == [5, 3, 4, 2]
    order = [6, 3, 2, 5, 4, 1, 0]  # the tail goes before what was used more often, the head after it
    assert [int(index.evict(1)[0]) - first_block for _ in order] == order


def test_lfu_moves_to_dram_in_the_order_in_which_it_evicts_after_a_split_too():
    index = RadixIndex(1, np.ones(NUM_BLOCKS, dtype=np.int32), LFU(), NUM_HBM)
    split_by_a_match(index, first_block=0)
    for place, block in enumerate([6, 3, 2, 5, 4, 1, 0], NUM_HBM):
        moved = index.coldest(1)
        assert moved.tolist() == [block]
        index.repoint(moved, np.array([place], dtype=np.int32))
    assert len(index.coldest(1)) == 0


def test_lfu_does_not_count_what_an_insert_goes_on_from_as_used_once_more():
    index = index_of(LFU(), tokens(1, 2, 3, 4), tokens(1, 2, 5))
    [head] = index._tree.root.children.values()
    assert head.num_uses == 1 and [node.num_uses for node in head.children.values()] == [1, 1]
    index.match(tokens(1, 2, 3, 4))
    assert index.evict(5).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("kind", [RadixIndex, HashIndex])
def test_lfu_keeps_nothing_for_the_chunks_in_which_it_was_entered(kind):
    index = kind(1, np.ones(10, dtype=np.int32), LFU())
    for end in (1, 2, 3):
        index.insert(tokens(1, 2, 3)[:end], np.arange(end, dtype=np.int32))
    index.insert(tokens(9), np.array([9], dtype=np.int32))
    index.match(tokens(9))
    assert index.evict(4).tolist() == [2, 1, 0, 9]


@pytest.mark.parametrize("kind", [RadixIndex, HashIndex])
@pytest.mark.parametrize(("policy", "expected"), [(LRU(), [1, 3, 2]), (FIFO(), [3, 2, 1]), (LFU(), [2, 1, 3])])
def test_prefixes_come_in_the_order_in_which_they_would_stay(kind, policy, expected):
    index = kind(1, np.ones(10, dtype=np.int32), policy)
    for number in (1, 2, 3):
        index.insert(tokens(number), np.array([number], dtype=np.int32))
    for number in (2, 2, 3, 1):
        index.match(tokens(number))
    assert [int(path[0]) for path, _ in index.iter_prefixes()] == expected


class AllAlike(Eviction):
    """Every leaf may go first."""

    def key(self, node):
        return (0.0,)


@pytest.mark.parametrize("policy", [LRU, LFU, FIFO, CostAware, AllAlike])
@pytest.mark.parametrize("kind", [RadixIndex, HashIndex])
def test_what_goes_is_the_same_however_many_are_asked_for_at_once(kind, policy):
    """Steps that are settled as one evict at once what they would have evicted one after the other."""
    orders = []
    for at_once in (1, 3, 40):
        rng, refcounts = np.random.default_rng(5), np.ones(1000, dtype=np.int32)
        index = kind(2, refcounts, eviction=policy())
        for number in range(12):
            prompt = np.concatenate([rng.integers(0, 2, 4), rng.integers(0, 2, 2 * number)]).astype(np.int32)
            num_new = len(prompt) // 2 - len(index.match(prompt).blocks)
            blocks = np.concatenate([index.peek(prompt).blocks, index.num_blocks + np.arange(num_new)])
            index.insert(prompt, blocks.astype(np.int32))
        refcounts[rng.integers(0, index.num_blocks, 6)] = 3  # in use
        gone = []
        while len(some := index.evict(min(at_once, 40 - len(gone)))):
            gone += some.tolist()
        orders.append(gone)
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) > 20


def test_a_prompt_in_use_that_grows_chunk_by_chunk_waits_once_for_each_of_its_blocks():
    """Not once for each chunk that was looked at: what eviction looks at would grow with the square of its length."""
    pool, request = BlockPool(64, 1, RadixIndex, num_dram_blocks=8), ("request", "a", 0)
    blocks = np.empty(0, dtype=np.int32)
    for end in range(4, 60, 4):
        blocks = np.concatenate([blocks, pool.alloc(4, request)])
        pool.publish(np.arange(end, dtype=np.int32), blocks)
        assert len(pool.swap_out(1).arrived) == 0
    assert sorted(pool.index._in_hbm._parked._blocks.view.tolist()) == sorted(blocks.tolist())
    pool.release_all(request)
    assert len(pool.swap_out(8).arrived) == 8
    pool.delete(np.arange(56, dtype=np.int32))
    pool.check()
