"""MemPools of a few small blocks, and two holders, for tests of the calls of Table 1."""

import functools

import torch

from memserve.kvcache import CacheGeometry, DiscreteLayout, MemPool, RadixIndex

A, B = ("request", "a", 0), ("request", "b", 0)
GEOMETRY = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)


def make_pool(num_blocks=8, num_dram_blocks=0, index=RadixIndex, incarnation=3, layout=None):
    return MemPool(
        GEOMETRY,
        layout or DiscreteLayout(),
        num_blocks,
        functools.partial(index),
        num_dram_blocks=num_dram_blocks,
        incarnation=incarnation,
    )
