"""MemPools of a few small blocks, and two holders, for tests of the calls of Table 1."""

import functools

import numpy as np
import torch

from memserve.kvcache import AtOnce, CacheGeometry, DiscreteLayout, Medium, MemPool, RadixIndex, address

A, B = ("request", "a", 0), ("request", "b", 0)
GEOMETRY = CacheGeometry(num_layers=2, block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)


def make_pool(num_blocks=8, num_dram_blocks=0, index=RadixIndex, incarnation=3, layout=None, engine=AtOnce):
    return MemPool(
        GEOMETRY,
        layout or DiscreteLayout(),
        num_blocks,
        functools.partial(index),
        num_dram_blocks=num_dram_blocks,
        incarnation=incarnation,
        engine=engine,
    )


def filled_pool(num_blocks=4, num_dram_blocks=4, **options):
    """A pool whose HBM is full of one cached prompt, its tokens and its addresses; blocks say which they are."""
    pool = make_pool(num_blocks, num_dram_blocks, **options)
    tokens = np.arange(4 * num_blocks, dtype=np.int32)
    addrs = pool.alloc_mem(num_blocks, holder=A)
    for i in range(num_blocks):
        pool.kv[:, :, i] = i + 1
    pool.insert(tokens, addrs, holder=A)
    pool.blocks.release_all(A)
    return pool, tokens, addrs


def contents(pool, addrs):
    """The first element of each block, wherever it lies."""
    arenas = {Medium.HBM: pool.arena, Medium.DRAM: pool.dram}
    blocks, media = address.block_of(addrs), address.medium_of(addrs)
    return [
        int(arenas[Medium(m)].kv[0, 0, b].flatten()[0]) for b, m in zip(blocks.tolist(), media.tolist(), strict=True)
    ]
