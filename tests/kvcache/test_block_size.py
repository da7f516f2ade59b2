"""A block size that is none is refused by whatever takes one, before anything is made."""

import numpy as np
import pytest
import torch

from memserve.kvcache import BlockPool, CacheGeometry, DiscreteLayout, HashIndex, MemPool, NullIndex, RadixIndex

odd_sizes = pytest.mark.parametrize("block_size", [0, -1, 2.5, "16", True, None])


def named(block_size):
    return pytest.raises(ValueError, match=f"^block_size={block_size!r}: expected an integer >= 1$")


@odd_sizes
def test_a_geometry_and_so_a_mempool_refuses_it(block_size):
    with named(block_size):
        MemPool(CacheGeometry(2, block_size, 1, 2, torch.float32), DiscreteLayout(), 8, RadixIndex, num_dram_blocks=4)


@odd_sizes
@pytest.mark.parametrize("index", [RadixIndex, HashIndex])
def test_an_index_refuses_it(index, block_size):
    with named(block_size):
        index(block_size, np.zeros(8, dtype=np.int32))


@odd_sizes
@pytest.mark.parametrize("num_dram_blocks", [0, 4])
def test_a_block_pool_refuses_it_before_it_makes_an_index(block_size, num_dram_blocks):
    made = []

    def index(block_size, refcounts, *, num_hbm_blocks):
        made.append(refcounts)
        return NullIndex(block_size, refcounts)

    with named(block_size):
        BlockPool(8, block_size, index, num_dram_blocks=num_dram_blocks)
    assert made == []
