"""A MemPool and the model of it side by side: what an address means in both, and what must hold after a step.

A block's KV in the arena is the number of the token prefix it was computed for, or one of its own until it is: a wrong
hit, a lost, overwritten or shared block shows in the bytes, whatever the books say, and wherever the block was moved.
"""

import functools

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from kvcache import brute_force
from kvcache.pool_model import DRAM, HBM, PoolModel

from memserve.kvcache import (
    FIFO,
    LFU,
    LRU,
    AggregatedLayout,
    CacheGeometry,
    CostAware,
    DiscreteLayout,
    MemPool,
    RadixIndex,
    address,
)
from memserve.kvcache.hash_index import HashIndex

NUM_BLOCKS = 10
BLOCK_SIZE = 2
GEOMETRY = CacheGeometry(num_layers=2, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=1, dtype=torch.float64)
EVICTIONS = {
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "cost_aware": functools.partial(CostAware, brute_force.ATTENTION_TOKENS, brute_force.HORIZON),
}


class PoolPair(RuleBasedStateMachine):
    """One pool of any kind, its model, and the comparison. The rules are the subclass's."""

    indexes = (RadixIndex, RadixIndex, RadixIndex, HashIndex)
    evictions = tuple(EVICTIONS)

    @initialize(
        index=st.runner().flatmap(lambda machine: st.sampled_from(machine.indexes)),
        eviction=st.runner().flatmap(lambda machine: st.sampled_from(machine.evictions)),
        layout=st.sampled_from([DiscreteLayout, AggregatedLayout]),
        num_dram_blocks=st.sampled_from([3, 8, 0]),
    )
    def make(self, index, eviction, layout, num_dram_blocks):
        num_dram_blocks = num_dram_blocks if index is RadixIndex else 0  # a HashIndex has no tiers
        factory = functools.partial(index, eviction=EVICTIONS[eviction]())
        self.pool, self.other = (
            MemPool(GEOMETRY, layout(), NUM_BLOCKS, factory, num_dram_blocks=num_dram_blocks, incarnation=incarnation)
            for incarnation in (3, 4)
        )
        has_nodes = index is RadixIndex
        self.model = PoolModel(NUM_BLOCKS, num_dram_blocks, block_size=BLOCK_SIZE, order=eviction, has_nodes=has_nodes)
        self.codes = {}  # prefix -> the number that stands for its KV
        self.seen = set()  # every address that was ever given

    # -- what the arena holds -------------------------------------------------------------------------------------

    def write(self, blocks):
        for block in blocks:
            self.kv(block.medium)[:, :, address.block_of(np.int64(block.addr))] = block.kv

    def compute(self, blocks, prefixes):
        """Writes the KV of these prefixes."""
        for block, prefix in zip(blocks, prefixes, strict=True):
            block.kv = self.codes.setdefault(prefix, len(self.codes) + 1)
        self.write(blocks)

    def kv(self, medium):
        """[L, 2, N, B, K, D], a view."""
        return (self.pool.kv if medium is HBM else self.pool.dram.kv).numpy()

    def learn(self):
        """Asks the pool for the new addresses of cached blocks that moved."""
        if any(block.addr is None for block in self.model.index.blocks.values()):
            where = {
                tuple(tokens[: (i + 1) * BLOCK_SIZE].tolist()): addr
                for tokens, blocks in self.pool.blocks.index.iter_prefixes()
                for i, addr in enumerate(self.pool.addresses(blocks).tolist())
            }
            for prefix, block in self.model.index.blocks.items():
                if block.addr is None:
                    self.name(block, where[prefix])

    def name(self, block, addr):
        """A block that was moved, or is new, has this address now."""
        assert addr not in self.seen, "an address was used a second time"
        assert address.medium_of(np.int64(addr)) == block.medium, "a block is in the other medium"
        self.seen.add(addr)
        block.addr = addr

    def follow(self, blocks, addrs):
        """The pool says that these blocks are at these addresses now."""
        for block, addr in zip(blocks, addrs.tolist(), strict=True):
            if block.addr is None:
                self.name(block, addr)
            assert block.addr == addr
        self.learn()

    # -- after every step -----------------------------------------------------------------------------------------

    @invariant()
    def the_pools_own_check_passes(self):
        self.pool.check()

    @invariant()
    def the_counts_are_the_models(self):
        stats, model = self.pool.stats(), self.model
        assert stats.num_free == model.free(HBM), "a block leaked, or was freed under its holder"
        assert stats.num_free_dram == model.free(DRAM), "a block leaked, or was freed under its holder"
        assert stats.num_evictable == len(model.evictable(HBM))
        assert stats.num_evictable_dram == len(model.evictable(DRAM))
        assert stats.num_indexed == len(model.index.blocks)
        assert stats.num_evicted == model.num_evicted
        assert (stats.num_swapped_out, stats.num_swapped_in) == (model.num_swapped_out, model.num_swapped_in)

    @invariant()
    def every_holder_holds_what_the_model_says(self):
        allocator = self.pool.blocks.allocator
        ledger = {holder: allocator.held_by(holder) for holder in allocator.holders() if holder != ("index",)}
        expected = {holder: addrs_of(blocks).tolist() for holder, blocks in self.model.held.items()}
        assert {h: self.pool.addresses(blocks).tolist() for h, blocks in ledger.items()} == expected

    @invariant()
    def every_block_in_use_holds_its_own_kv(self):
        for medium in (HBM, DRAM):
            if blocks := self.model.alive(medium):
                kv = self.kv(medium)[:, :, address.block_of(addrs_of(blocks))]
                expected = np.array([block.kv for block in blocks])[:, None, None, None]
                assert (kv == expected).all(), "a block holds other tokens' KV"

    @invariant()
    def the_index_lists_the_models_paths(self):
        index = self.model.index
        listed = {
            tuple(tokens.tolist()): self.pool.addresses(blocks).tolist()
            for tokens, blocks in self.pool.blocks.index.iter_prefixes()
        }
        inner = {prefix[:-BLOCK_SIZE] for prefix in index.blocks}
        leaves = [prefix for prefix in index.blocks if prefix not in inner]
        assert listed == {leaf: [index.blocks[p].addr for p in index.prefixes(leaf)] for leaf in leaves}


def as_addrs(addrs):
    """int64 [n]; what cannot be that, as it is."""
    return np.array(addrs, dtype=np.int64) if isinstance(addrs, list) and set(map(type, addrs)) <= {int} else addrs


def addrs_of(blocks):
    return np.array([block.addr for block in blocks], dtype=np.int64)
