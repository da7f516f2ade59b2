"""Mixed: blocks from both media in one allocation (Table 1: "HBM-only, DRAM-only or mixed"). Knows numbers only."""

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import Holder
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import OutOfBlocks


def alloc_mixed(pool: BlockPool, num_blocks: int, holder: Holder) -> np.ndarray:
    """`num_blocks` blocks, int32, those in HBM first: HBM's free ones, then DRAM's, then what DRAM caches, then HBM.

    Raises OutOfBlocks, with nothing allocated.
    """
    books = pool.allocator
    wanted = max(0, num_blocks - books.num_free)
    # DRAM's part first: making room in HBM would fill it
    in_dram = _alloc_most(pool, min(wanted, books.num_free_dram + books.num_index_only_dram), holder)
    try:
        in_hbm = pool.alloc(num_blocks - len(in_dram), holder)
    except BaseException:  # also of a copy that failed: nothing is allocated then
        pool.release(in_dram, holder)
        raise
    return np.concatenate([in_hbm, in_dram])


def _alloc_most(pool: BlockPool, num_blocks: int, holder: Holder) -> np.ndarray:
    """Blocks in DRAM: `num_blocks` of them, or those that are free if what it caches lies above blocks in use."""
    try:
        return pool.alloc(num_blocks, holder, Medium.DRAM)
    except OutOfBlocks:
        return pool.alloc(pool.allocator.num_free_dram, holder, Medium.DRAM)
