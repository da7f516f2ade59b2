"""What every index answers: the tree as the baseline of speed, which is none of what is found."""

import numpy as np
import pytest
from kvcache.brute_force import assert_agrees_with_brute_force

from memserve.kvcache import FIFO, LFU, LRU, HashIndex, RadixIndex

pytestmark = pytest.mark.parametrize("index_class", [RadixIndex, HashIndex])


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_agree_with_brute_force(index_class, seed):
    assert_agrees_with_brute_force(index_class, seed)


def test_a_partial_match_ages_only_the_blocks_it_used_and_a_block_goes_before_the_one_it_continues(index_class):
    index = index_class(1, np.ones(8, dtype=np.int32))
    index.insert(np.array([1, 2, 3, 4], dtype=np.int32), np.arange(4, dtype=np.int32))
    index.insert(np.array([9, 9], dtype=np.int32), np.array([4, 5], dtype=np.int32))
    index.match(np.array([1, 2], dtype=np.int32))
    assert index.evict(4).tolist() == [3, 2, 5, 4]


def cached(index_class, *prompts):
    """An index of these prompts, a block a token, that nobody else holds."""
    index = index_class(1, np.ones(8, dtype=np.int32))
    for i, prompt in enumerate(prompts):
        index.insert(np.array(prompt, dtype=np.int32), np.arange(4 * i, 4 * i + len(prompt), dtype=np.int32))
    return index


def test_delete_takes_what_eviction_has_left_of_a_prompt_and_cannot_tell_it_from_a_shorter_one(index_class):
    prompt, evicted, shorter = np.array([1, 2, 3], dtype=np.int32), cached(index_class, [1, 2, 3]), [1, 2]
    evicted.evict(1)
    for index in (evicted, cached(index_class, shorter)):
        assert sorted(index.delete(prompt).tolist()) == [0, 1] and index.num_blocks == 0


def test_delete_leaves_what_other_prompts_continue_and_does_nothing_where_nothing_is_cached(index_class):
    index = cached(index_class, [1, 2, 4], [9])
    for prompt in ([1, 2, 3], [1, 3], [7, 8], []):
        assert index.delete(np.array(prompt, dtype=np.int32)).tolist() == [] and index.num_blocks == 4


def test_insert_refuses_tokens_that_do_not_fill_the_blocks(index_class):
    index = index_class(4, np.zeros(4, dtype=np.int32))
    with pytest.raises(ValueError, match="5 tokens for 1 blocks"):
        index.insert(np.arange(5, dtype=np.int32), np.arange(1, dtype=np.int32))
    assert index.num_blocks == 0


@pytest.mark.parametrize(("policy", "first"), [(LRU(), 1), (FIFO(), 0), (LFU(), 2)])
def test_each_eviction_policy_has_its_own_first(index_class, policy, first):
    index = index_class(1, np.ones(3, dtype=np.int32), policy)
    prompts = [np.array([token], dtype=np.int32) for token in range(3)]
    for block, prompt in enumerate(prompts):
        index.insert(prompt, np.array([block], dtype=np.int32))
    for used in (0, 0, 1, 1, 2, 0):
        index.match(prompts[used])
    assert index.evict(1).tolist() == [first]
