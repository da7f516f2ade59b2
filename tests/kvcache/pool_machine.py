"""A MemPool and a brute-force model of it, driven side by side by hypothesis; compared whole after every step.

The model names every block by its address, so that an operation which moves blocks has to re-point addresses and no
more. A block's KV in the arena is the number of the token prefix it was computed for: a wrong hit, a lost or a shared
block shows in the bytes, whatever the books say.
"""

import functools
from collections import Counter

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kvcache.brute_force import BruteForceIndex

from memserve.kvcache import (
    CacheGeometry,
    DiscreteLayout,
    MemPool,
    NotHeld,
    OutOfBlocks,
    RadixIndex,
    StaleAddress,
    address,
)
from memserve.kvcache.hash_index import HashIndex

NUM_BLOCKS = 10
BLOCK_SIZE = 2
GEOMETRY = CacheGeometry(num_layers=1, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=1, dtype=torch.float64)

holders = st.sampled_from([("request", name, 0) for name in "abcd"])
lengths = st.integers(0, 7 * BLOCK_SIZE)
# a head of zeros and another tail: most prompts share a prefix with most others, and leave it anywhere
prompts = st.builds(lambda n, head, tail: ([0] * head + [tail] * n)[:n], lengths, lengths, st.integers(1, 3))
masks = st.integers(0, 2**NUM_BLOCKS - 1)  # which of at most NUM_BLOCKS blocks
counts = st.integers(0, NUM_BLOCKS + 1)


class PoolModel:
    """What a pool must hold. held: holder -> addresses, in the order taken. dead: addresses of freed blocks."""

    def __init__(self):
        self.held = {}
        self.index = BruteForceIndex(self, BLOCK_SIZE)
        self.dead = []
        self.evicted = 0

    def __getitem__(self, addr):
        """The block's number of holders, the index included."""
        return self.refcounts()[addr]

    def refcounts(self):
        return Counter(a for addrs in [*self.held.values(), self.index.blocks.values()] for a in addrs)

    def take(self, holder, addrs):
        """The holder takes what it does not hold yet."""
        held = self.held.setdefault(holder, [])
        held += [addr for addr in addrs if addr not in held]
        self.forget_empty()

    def drop(self, holder, addrs):
        self.held[holder] = [addr for addr in self.held[holder] if addr not in addrs]
        self.forget_empty()
        self.bury(addrs)

    def forget_empty(self):
        self.held = {holder: addrs for holder, addrs in self.held.items() if addrs}

    def bury(self, addrs):
        """Addresses that nobody holds any more are dead for good."""
        alive = self.refcounts()
        self.dead += [addr for addr in addrs if not alive[addr]]

    def room_for(self, count):
        """Evicts as alloc_mem has to; whether `count` blocks are free then."""
        alive = self.refcounts()
        free = NUM_BLOCKS - len(alive)
        if count > free + sum(alive[addr] == 1 for addr in self.index.blocks.values()):
            return False
        gone = self.index.evict(count - free)
        self.evicted += len(gone)
        self.bury(gone)
        return free + len(gone) >= count


class PoolMachine(RuleBasedStateMachine):
    """Rules are what callers do, rightly and wrongly; invariants are what must hold after any of it."""

    def __init__(self):
        super().__init__()
        self.model = PoolModel()
        self.codes = {}  # prefix -> the number that stands for its KV
        self.pool = self._pool(RadixIndex, incarnation=3)
        self.other = self._pool(RadixIndex, incarnation=4)

    def _pool(self, index, incarnation):
        layout = DiscreteLayout()
        return MemPool(GEOMETRY, layout, NUM_BLOCKS, functools.partial(index), incarnation=incarnation)

    @initialize(index=st.sampled_from([RadixIndex, HashIndex]))
    def choose_index(self, index):
        self.pool = self._pool(index, incarnation=3)

    # -- what the arena holds -------------------------------------------------------------------------------------

    def code(self, prefix):
        return self.codes.setdefault(prefix, len(self.codes) + 1)

    def write(self, addrs, prefixes):
        for addr, prefix in zip(addrs, prefixes, strict=True):
            self.kv(addr)[:] = self.code(prefix)

    def kv(self, addr):
        """The KV of one block, a view."""
        return self.pool.kv.numpy()[:, :, address.block_of(np.int64(addr))]

    # -- memory ---------------------------------------------------------------------------------------------------

    @rule(holder=holders, count=counts)
    def alloc_mem(self, holder, count):
        self.try_alloc(holder, count)

    def try_alloc(self, holder, count):
        """New addresses, or None where the model says that there is no room."""
        if not self.model.room_for(count):
            self.refused(OutOfBlocks, lambda: self.pool.alloc_mem(count, holder=holder))
            return None
        addrs = self.pool.alloc_mem(count, holder=holder).tolist()
        used = self.model.refcounts()
        assert len(set(addrs)) == count and not any(used[addr] for addr in addrs), "a block in use was handed out"
        assert not set(addrs) & set(self.model.dead), "an address was used a second time"
        self.model.take(holder, addrs)
        return addrs

    @rule(holder=holders, mask=masks)
    def free_mem(self, holder, mask):
        addrs = chosen(self.model.held.get(holder, []), mask)
        self.pool.free_mem(as_addrs(addrs), holder=holder)
        if addrs:
            self.model.drop(holder, addrs)

    @rule(holder=holders)
    def release_all(self, holder):
        addrs = self.model.held.get(holder, [])
        assert self.pool.blocks.release_all(holder) == len(addrs)
        if addrs:
            self.model.drop(holder, addrs)

    @rule(holder=holders, mask=masks)
    def retain(self, holder, mask):
        mine = self.model.held.get(holder, [])
        addrs = chosen([addr for addr in self.model.refcounts() if addr not in mine], mask)
        self.pool.retain(as_addrs(addrs), holder=holder)
        self.model.take(holder, addrs)

    # -- index ----------------------------------------------------------------------------------------------------

    @rule(holder=holders, tokens=prompts)
    def serve(self, holder, tokens):
        """As a request from its arrival to its end."""
        self.compute_and_insert(holder, tokens, reuse=True)
        self.release_all(holder)

    @rule(holder=holders, tokens=prompts, reuse=st.booleans())
    def compute_and_insert(self, holder, tokens, reuse):
        """As a running request: match and hold, compute the rest, insert. Or compute all of it, a second time."""
        prefixes = self.model.index.prefixes(tokens)
        found = self.matched(tokens) if reuse else []
        self.pool.retain(as_addrs([a for a in found if a not in self.model.held.get(holder, [])]), holder=holder)
        self.model.take(holder, found)
        new = self.try_alloc(holder, len(prefixes) - len(found))
        if new is None:
            return
        self.write(new, prefixes[len(found) :])
        whole = tokens[: len(prefixes) * BLOCK_SIZE]
        canonical = self.pool.insert(whole, as_addrs([*found, *new]), holder=holder).tolist()
        assert canonical == self.model.index.insert(whole, [*found, *new])
        self.model.take(holder, canonical)

    @rule(tokens=prompts, limit=st.none() | lengths)
    def match(self, tokens, limit):
        self.matched(tokens, limit)

    def matched(self, tokens, limit=None):
        found = self.pool.match(tokens, limit)
        assert found.addrs.tolist() == self.model.index.match(tokens, limit)
        assert found.num_tokens == len(found.addrs) * BLOCK_SIZE
        return found.addrs.tolist()

    @rule(tokens=prompts)
    def delete(self, tokens):
        gone = self.model.index.delete(tokens)
        assert self.pool.delete(tokens) == len(gone)
        self.model.bury(gone)

    @rule(sure=st.integers(0, 4))
    def clear(self, sure):
        if sure:
            return
        gone = list(self.model.index.blocks.values())
        self.model.index.blocks.clear()
        self.model.index.used.clear()
        assert self.pool.blocks.clear() == len(gone)
        self.model.bury(gone)

    # -- wrong calls: refused by name, and the invariants below see that nothing changed --------------------------

    @rule(holder=holders, pick=st.integers(0, 99), mask=masks)
    def use_a_dead_address(self, holder, pick, mask):
        if self.model.dead:
            mine = chosen(self.model.held.get(holder, []), mask)
            self.stale([*mine, self.model.dead[pick % len(self.model.dead)]], holder)

    @rule(holder=holders)
    def use_another_instances_address(self, holder):
        theirs = self.other.alloc_mem(1, holder=holder)
        self.stale(theirs.tolist(), holder)
        self.other.free_mem(theirs, holder=holder)

    def stale(self, addrs, holder):
        tokens = [0] * (BLOCK_SIZE * len(addrs))
        self.refused(StaleAddress, lambda: self.pool.free_mem(as_addrs(addrs), holder=holder))
        self.refused(StaleAddress, lambda: self.pool.retain(as_addrs(addrs), holder=holder))
        self.refused(StaleAddress, lambda: self.pool.insert(tokens, as_addrs(addrs), holder=holder))

    @rule(holder=holders, mask=masks)
    def free_what_another_holds(self, holder, mask):
        mine = self.model.held.get(holder, [])
        foreign = [addr for addr in self.model.refcounts() if addr not in mine]
        if foreign:
            addrs = [*chosen(mine, mask), foreign[mask % len(foreign)]]
            self.refused(NotHeld, lambda: self.pool.free_mem(as_addrs(addrs), holder=holder))

    @rule(holder=holders, mask=masks)
    def free_a_block_twice_at_once(self, holder, mask):
        if addrs := chosen(self.model.held.get(holder, []), mask):
            self.refused(NotHeld, lambda: self.pool.free_mem(as_addrs([*addrs, addrs[0]]), holder=holder))

    @rule(holder=holders, count=st.sampled_from([-1, True, 1.0, "1"]))
    def alloc_a_number_that_is_none(self, holder, count):
        self.refused(ValueError, lambda: self.pool.alloc_mem(count, holder=holder))

    @rule(tokens=st.sampled_from([[0.5, 1.0], [[0, 1]], [-1, 0], [2**31, 0], ["a", "b"]]))
    def match_what_is_no_tokens(self, tokens):
        for call in (self.pool.match, self.pool.delete):
            self.refused(ValueError, functools.partial(call, tokens))

    def refused(self, error, call):
        try:
            call()
        except error:
            return
        raise AssertionError(f"expected {error.__name__}")

    # -- after every step -----------------------------------------------------------------------------------------

    @invariant()
    def the_pools_own_check_passes(self):
        self.pool.check()

    @invariant()
    def the_counts_are_the_models(self):
        stats, alive = self.pool.stats(), self.model.refcounts()
        assert stats.num_free == NUM_BLOCKS - len(alive), "a block leaked, or was freed under its holder"
        assert stats.num_indexed == len(self.model.index.blocks)
        assert stats.num_evictable == sum(alive[addr] == 1 for addr in self.model.index.blocks.values())
        assert stats.num_evicted == self.model.evicted

    @invariant()
    def every_holder_holds_what_the_model_says(self):
        allocator = self.pool.blocks.allocator
        ledger = {holder: allocator.held_by(holder) for holder in allocator.holders() if holder != ("index",)}
        assert {h: self.pool.addresses(blocks).tolist() for h, blocks in ledger.items()} == self.model.held

    @invariant()
    def every_cached_block_holds_the_kv_of_its_prefix(self):
        for prefix, addr in self.model.index.blocks.items():
            assert (self.kv(addr) == self.code(prefix)).all(), "a cached block holds other tokens' KV"

    @invariant()
    def the_index_lists_the_models_paths(self):
        index = self.model.index
        listed = {
            tuple(tokens.tolist()): self.pool.addresses(blocks).tolist()
            for tokens, blocks in self.pool.blocks.index.iter_prefixes()
        }
        leaves = [prefix for prefix in index.blocks if not index.children(prefix)]
        assert listed == {leaf: [index.blocks[p] for p in index.prefixes(leaf)] for leaf in leaves}


def chosen(addrs, mask):
    """The addresses at the mask's set bits."""
    return [addr for i, addr in enumerate(addrs) if mask >> i & 1]


def as_addrs(addrs):
    return np.array(addrs, dtype=np.int64)
