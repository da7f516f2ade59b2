"""What is RadixIndex's own; what it answers as HashIndex does is in test_index.py."""

import numpy as np

from memserve.kvcache import RadixIndex
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
        assert index.peek(np.arange(400, dtype=np.int32)) == left


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
