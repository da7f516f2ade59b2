"""What is RadixIndex's own; what it answers as HashIndex does is in test_index.py."""

import numpy as np
import pytest

from memserve.kvcache import RadixIndex
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.eviction import FIFO, LFU, LRU, CostAware
from memserve.kvcache.radix_tree import subtree


def held_bytes(index):
    """Bytes of tokens that an index keeps alive."""
    owners = {}
    for node in subtree(index._tree.root):
        owner = node.tokens if node.tokens.base is None else node.tokens.base
        owners[id(owner)] = owner.nbytes
    return sum(owners.values())


def test_a_head_that_outlives_its_tail_does_not_keep_the_tails_tokens():
    index = RadixIndex(1, np.ones(400, dtype=np.int32))
    index.insert(np.arange(400, dtype=np.int32), np.arange(400, dtype=np.int32))
    for num_tokens in (300, 200, 100, 10):
        index.match(np.arange(num_tokens, dtype=np.int32))
    for left in (390, 250, 90, 9, 3):
        index.evict(index.num_blocks - left)
        assert index.num_blocks == left and held_bytes(index) <= 2 * 4 * left
        assert index.peek(np.arange(400, dtype=np.int32)).num_tokens == left


def test_deleting_a_tail_frees_its_tokens_too():
    index = RadixIndex(1, np.ones(400, dtype=np.int32))
    index.insert(np.arange(400, dtype=np.int32), np.arange(400, dtype=np.int32))
    other = np.concatenate([np.arange(10), [999]]).astype(np.int32)
    index.insert(other, np.concatenate([np.arange(10), [398]]).astype(np.int32))
    index.delete(np.arange(400, dtype=np.int32))
    assert index.num_blocks == 11 and held_bytes(index) <= 2 * 4 * 11


def test_an_index_does_not_change_with_the_array_it_was_given():
    index, tokens = RadixIndex(2, np.ones(4, dtype=np.int32)), np.arange(8, dtype=np.int32)
    blocks = np.arange(4, dtype=np.int32)
    index.insert(tokens, blocks)
    tokens[:], blocks[:] = 7, 0
    assert index.match(np.arange(8, dtype=np.int32)).blocks.tolist() == [0, 1, 2, 3]


def nodes_of_a_request_that_grows(policy, num_blocks=20):
    """A request enters its blocks one after the other, as decoding fills them. Returns the index and its nodes."""
    index = RadixIndex(2, np.ones(num_blocks, dtype=np.int32), policy)
    tokens = np.arange(2 * num_blocks, dtype=np.int32)
    for end in range(1, num_blocks + 1):
        index.insert(tokens[: 2 * end], np.arange(end, dtype=np.int32))
    return index, list(subtree(index._tree.root))[1:]


@pytest.mark.parametrize("policy", [LRU(), LFU()], ids=["lru", "lfu"])
def test_blocks_entered_one_by_one_make_one_node(policy):
    index, nodes = nodes_of_a_request_that_grows(policy)
    assert len(nodes) == 1 and nodes[0].blocks.tolist() == list(range(20))
    assert index.match(np.arange(40, dtype=np.int32)).blocks.tolist() == list(range(20))
    assert index.evict(3).tolist() == [19, 18, 17]


@pytest.mark.parametrize("policy", [FIFO(), CostAware()], ids=["fifo", "cost_aware"])
def test_blocks_that_an_order_tells_apart_stay_nodes_of_their_own(policy):
    assert len(nodes_of_a_request_that_grows(policy)[1]) == 20


def test_a_leaf_that_others_continue_does_not_grow():
    index = RadixIndex(1, np.ones(9, dtype=np.int32))
    for last, block in ((7, 2), (8, 3)):
        index.insert(np.array([1, 2, last], dtype=np.int32), np.array([0, 1, block], dtype=np.int32))
    [head] = index._tree.root.children.values()
    assert head.blocks.tolist() == [0, 1] and len(head.children) == 2


def test_a_leaf_grown_from_a_heads_tail_frees_the_tokens_it_left():
    index = RadixIndex(1, np.ones(400, dtype=np.int32))
    index.insert(np.arange(200, dtype=np.int32), np.arange(200, dtype=np.int32))
    index.match(np.arange(10, dtype=np.int32))
    index.insert(np.arange(210, dtype=np.int32), np.arange(210, dtype=np.int32))
    assert held_bytes(index) <= 2 * 4 * 210


class CountingOrder(LRU):
    """LRU that counts how often it is asked."""

    num_asked = 0

    def key(self, node):
        self.num_asked += 1
        return super().key(node)


@pytest.mark.parametrize("num_dram_blocks", [0, 400])
def test_making_room_looks_once_at_what_is_in_use(num_dram_blocks):
    order = CountingOrder()
    pool = BlockPool(600, 1, lambda *a, **k: RadixIndex(*a, eviction=order, **k), num_dram_blocks=num_dram_blocks)
    for i in range(600):
        blocks = pool.alloc(1, ("request", i))
        pool.publish(np.array([i], dtype=np.int32), blocks)
    for i in range(400, 600):
        pool.release_all(("request", i))  # in use: 400 that are colder than these
    before = order.num_asked
    for i in range(100):
        pool.alloc(1, ("new", i))
    assert order.num_asked - before < 4 * (600 + 100)
    pool.check()


def test_what_was_in_use_goes_in_its_turn_once_it_is_idle():
    refcounts = np.array([3, 1, 1, 1], dtype=np.int32)
    index = RadixIndex(1, refcounts)
    for block in range(4):
        index.insert(np.array([block], dtype=np.int32), np.array([block], dtype=np.int32))
    assert index.evict(1).tolist() == [1]
    refcounts[0] = 1
    assert index.evict(2).tolist() == [0, 2]


def test_a_leaf_that_grew_while_its_old_end_is_in_use_gives_up_its_new_end():
    refcounts = np.array([3, 3, 3], dtype=np.int32)
    index = RadixIndex(1, refcounts)
    index.insert(np.array([5, 6], dtype=np.int32), np.array([0, 1], dtype=np.int32))
    assert index.evict(1).tolist() == []
    index.insert(np.array([5, 6, 7], dtype=np.int32), np.arange(3, dtype=np.int32))
    refcounts[2] = 1
    assert index.evict(3).tolist() == [2]


def test_a_leaf_whose_block_moved_while_in_use_is_found_at_its_new_place():
    refcounts = np.array([3, 0, 1, 3], dtype=np.int32)
    index = RadixIndex(1, refcounts, num_hbm_blocks=2)
    index.insert(np.array([5], dtype=np.int32), np.array([3], dtype=np.int32))
    assert index.evict(1).tolist() == []
    index.repoint(np.array([3], dtype=np.int32), np.array([1], dtype=np.int32))
    refcounts[1] = 1  # the old place is in somebody else's use from now on
    assert index.evict(1).tolist() == [1]


def test_what_continues_a_prefix_has_its_own_number_of_uses():
    """A conversation's second turn finds the first, and enters what follows it: that is used once."""
    index, first, second = RadixIndex(2, np.ones(9, dtype=np.int32)), np.arange(4), np.arange(10)
    first, second, index.counts_apart = first.astype(np.int32), second.astype(np.int32), True
    index.insert(first, np.arange(2, dtype=np.int32))
    assert index.uses(second).tolist() == [1, 1]
    index.match(second)
    for end in (6, 8, 10):  # entered as its blocks fill
        index.insert(second[:end], np.arange(end // 2, dtype=np.int32))
    assert index.uses(second).tolist() == [2, 2, 1, 1, 1]
    index.match(second, 7)
    assert index.uses(second).tolist() == [3, 3, 2, 1, 1] and index.uses(second[:3]).tolist() == [3]


def test_what_goes_next_is_told_before_it_goes_and_stays_where_it_is():
    refcounts, known = np.ones(9, dtype=np.int32), np.zeros(9, dtype=bool)
    index = RadixIndex(1, refcounts)
    prompts = {
        name: np.array(tokens, dtype=np.int32) for name, tokens in {"ab": [1, 2], "ac": [1, 3], "d": [4]}.items()
    }
    for block, name in ((0, "ab"), (2, "d")):
        index.insert(prompts[name], np.arange(block, block + len(prompts[name]), dtype=np.int32))
    index.insert(prompts["ac"], np.array([0, 3], dtype=np.int32))
    for order, number in (("ab", 1), ("d", 2), ("ac", 3)):
        tokens, blocks = index.next_out(number, known)
        assert (tokens.tolist(), blocks[-1]) == (prompts[order].tolist(), {"ab": 1, "d": 2, "ac": 3}[order])
        known[blocks] = True
        assert index.next_out(number, known) is None, "the next one is further away"
    known[:] = False
    refcounts[1] = 3  # somebody uses what goes first
    assert index.next_out(1, known)[1].tolist() == [2]
    refcounts[1] = 1
    assert index.evict(4).tolist() == [1, 2, 3, 0]
