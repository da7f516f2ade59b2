"""RadixIndex against a brute-force model, and what is its own."""

import numpy as np
import pytest
from kvcache.brute_force import assert_agrees_with_brute_force

from memserve.kvcache import RadixIndex


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_agree_with_brute_force(seed):
    assert_agrees_with_brute_force(RadixIndex, seed)


def test_a_partial_match_ages_only_the_blocks_it_used():
    refcounts = np.ones(8, dtype=np.int32)
    index = RadixIndex(1, refcounts)
    index.insert(np.array([1, 2, 3, 4], dtype=np.int32), np.arange(4, dtype=np.int32))
    index.insert(np.array([9, 9], dtype=np.int32), np.array([4, 5], dtype=np.int32))
    index.match(np.array([1, 2], dtype=np.int32))
    assert index.evict(4).tolist() == [3, 2, 5, 4]


def test_insert_refuses_tokens_that_do_not_fill_the_blocks():
    index = RadixIndex(4, np.zeros(4, dtype=np.int32))
    with pytest.raises(ValueError, match="5 tokens for 1 blocks"):
        index.insert(np.arange(5, dtype=np.int32), np.arange(1, dtype=np.int32))
