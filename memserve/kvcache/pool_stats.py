"""PoolStats: how full a pool is, and what it has done. Plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolStats:
    """Blocks now, and counts since the pool was made.

    num_blocks, num_free, num_evictable, peak_used (most that requests held at a time): in HBM; *_dram: in DRAM.
    num_indexed: in the index, either medium.  num_swapped_out, num_swapped_in: blocks moved down and up.
    """

    num_blocks: int
    num_free: int
    num_evictable: int
    num_indexed: int
    num_evicted: int
    num_allocated: int
    peak_used: int
    num_dram_blocks: int
    num_free_dram: int
    num_evictable_dram: int
    num_swapped_out: int
    num_swapped_in: int
