"""Two MemPools and a model of each, side by side: what an address means in both, and what must hold after a step.

A block's KV in the arena is the number of the token prefix it was computed for, or one of its own until it is: a wrong
hit, a lost, overwritten or shared block shows in the bytes, whatever the books say, and wherever the block was moved.
The rules face one of the two sides at a time; what they do not touch has nothing to be checked anew.
"""

import contextlib
import functools
import itertools

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kvcache import brute_force
from kvcache.pool_model import DRAM, HBM, PoolModel

from memserve.kvcache import (
    FIFO,
    LFU,
    LRU,
    AggregatedLayout,
    AtOnce,
    CacheGeometry,
    Copy,
    CostAware,
    DiscreteLayout,
    IndexFollower,
    MemPool,
    MissedEvents,
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


class CopyByHand(Copy):
    """Ends when it is told to, or when somebody cannot wait."""

    def __init__(self, copy):
        self._copy, self.was_told = copy, False

    def has_ended(self, now_ns):
        return self.was_told

    def finish(self):
        self._copy()


class ByHand(AtOnce):
    """Copies at once, but beside everything else what is started within `beside`."""

    def __init__(self, copier):
        super().__init__(copier)
        self.started, self._is_beside = [], False

    @contextlib.contextmanager
    def beside(self):
        self._is_beside = True
        yield
        self._is_beside = False

    def start(self, source, target, now_ns):
        """Room is made at once, whatever it is made for."""
        if not self._is_beside:
            return super().start(source, target, now_ns)
        self.started.append(CopyByHand(lambda: self._copier.copy(source, target)))
        return self.started[-1]

    def end(self, copies):
        for copy in copies:
            copy.was_told = True


class Side:
    """One pool, its model, and a follower of its index. swaps: the copy of each that was begun; tickets: theirs.

    seen: every address that was ever given.  missed: events were dropped that the follower has not asked for anew.
    """

    def __init__(self, pool, model):
        self.pool, self.model, self.seen = pool, model, set()
        self.engine, self.swaps, self.tickets = pool.blocks._swaps._engine, {}, {}
        self.follower, self.missed = IndexFollower(BLOCK_SIZE), False
        self.follower.rebuild(pool.follow())

    def write(self, blocks):
        for block in blocks:
            self.kv(block.medium)[:, :, address.block_of(np.int64(block.addr))] = block.kv

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
                    self._name(block, where[prefix])

    def _name(self, block, addr):
        """A block that was moved, or is new, has this address now."""
        assert addr not in self.seen, "an address was used a second time"
        assert address.medium_of(np.int64(addr)) == block.medium, "a block is in the other medium"
        self.seen.add(addr)
        block.addr = addr

    def follow(self, blocks, addrs):
        """The pool says that these blocks are at these addresses now."""
        for block, addr in zip(blocks, addrs.tolist(), strict=True):
            if block.addr is None:
                self._name(block, addr)
            assert block.addr == addr
        self.learn()

    def begun(self, swap, ticket):
        """A swap was begun, or found nothing to do."""
        self.learn()
        if swap is None:
            assert ticket.ended
            return
        self.swaps[swap], self.tickets[swap] = self.engine.started[-1], ticket
        targets = self.pool.blocks.allocator.held_by(swap.holders[0])[: len(swap.targets)]
        self.follow(swap.targets, self.pool.addresses(targets))

    # -- after every step -----------------------------------------------------------------------------------------

    def check(self):
        self.pool.check()
        self.swaps_end_as_the_models()
        self.the_counts_are_the_models()
        self.every_holder_holds_what_the_model_says()
        self.every_block_in_use_holds_its_own_kv()
        self.the_index_lists_the_models_paths()
        self.the_follower_holds_what_the_index_holds()

    def the_counts_are_the_models(self):
        stats, model = self.pool.stats(), self.model
        assert stats.num_free == model.free(HBM), "a block leaked, or was freed under its holder"
        assert stats.num_free_dram == model.free(DRAM), "a block leaked, or was freed under its holder"
        assert stats.num_evictable == len(model.evictable(HBM))
        assert stats.num_evictable_dram == len(model.evictable(DRAM))
        assert stats.num_indexed == len(model.index.blocks)
        assert stats.num_evicted == model.num_evicted
        assert (stats.num_swapped_out, stats.num_swapped_in) == (model.num_swapped_out, model.num_swapped_in)

    def swaps_end_as_the_models(self):
        for swap, ticket in list(self.tickets.items()):
            state = "open" if swap.is_open else "failed" if swap.failed else "done"
            assert ticket.state == state, f"{ticket} of a swap that is {state}"
            assert ticket.addrs.tolist() == swap.addrs
            if not swap.is_open:
                del self.tickets[swap]

    def every_holder_holds_what_the_model_says(self):
        allocator = self.pool.blocks.allocator
        ledger = {holder: allocator.held_by(holder) for holder in allocator.holders() if holder != ("index",)}
        expected = {holder: addrs_of(blocks).tolist() for holder, blocks in self.model.held.items()}
        assert {h: self.pool.addresses(blocks).tolist() for h, blocks in ledger.items()} == expected

    def every_block_in_use_holds_its_own_kv(self):
        for medium in (HBM, DRAM):
            if blocks := [block for block in self.model.alive(medium) if block.kv is not None]:
                kv = self.kv(medium)[:, :, address.block_of(addrs_of(blocks))]
                expected = np.array([block.kv for block in blocks])[:, None, None, None]
                assert (kv == expected).all(), "a block holds other tokens' KV"

    def the_index_lists_the_models_paths(self):
        listed = {
            tuple(tokens.tolist()): self.pool.addresses(blocks).tolist()
            for tokens, blocks in self.pool.blocks.index.iter_prefixes()
        }
        assert listed == self._paths(lambda block: block.addr)

    def the_follower_holds_what_the_index_holds(self):
        """Each event comes twice; the first after a gap is noticed, and then a snapshot makes up for it."""
        for event in self.pool.drain_events():
            if self.missed:
                seq = self.follower.seq
                refused(MissedEvents, lambda late=event: self.follower.apply(late))
                assert self.follower.seq == seq
                self.follower.rebuild(self.pool.follow())
                self.missed = False
            for _ in range(2):
                self.follower.apply(event)
        if not self.missed:
            followed = {tuple(tokens.tolist()): media.tolist() for tokens, media in self.follower.iter_prefixes()}
            assert followed == self._paths(lambda block: int(block.medium))
            for medium in (HBM, DRAM):
                cached = [block for block in self.model.index.blocks.values() if block.medium is medium]
                assert self.follower.num_blocks(medium) == len(cached)

    def _paths(self, what):
        """Each maximal cached path, and what there is to say of its blocks."""
        index = self.model.index
        inner = {prefix[:-BLOCK_SIZE] for prefix in index.blocks}
        leaves = [prefix for prefix in index.blocks if prefix not in inner]
        return {leaf: [what(index.blocks[p]) for p in index.prefixes(leaf)] for leaf in leaves}


class PoolPair(RuleBasedStateMachine):
    """Two pools of the same kind, their models, and the comparison. The rules are the subclass's."""

    indexes = (RadixIndex, RadixIndex, RadixIndex, HashIndex)
    evictions = tuple(EVICTIONS)

    @initialize(
        index=st.runner().flatmap(lambda machine: st.sampled_from(machine.indexes)),
        eviction=st.runner().flatmap(lambda machine: st.sampled_from(machine.evictions)),
        layout=st.sampled_from([DiscreteLayout, AggregatedLayout]),
        num_dram_blocks=st.sampled_from([8, 3, 8, 0]),
    )
    def make(self, index, eviction, layout, num_dram_blocks):
        num_dram_blocks = num_dram_blocks if index is RadixIndex else 0  # a HashIndex has no tiers
        factory = functools.partial(index, eviction=EVICTIONS[eviction]())
        scratch = itertools.count(-1, -1)
        self.sides = {}
        for incarnation in (3, 4):
            options = {"num_dram_blocks": num_dram_blocks, "incarnation": incarnation, "engine": ByHand}
            pool = MemPool(GEOMETRY, layout(), NUM_BLOCKS, factory, **options)
            has_nodes = index is RadixIndex
            order = {"block_size": BLOCK_SIZE, "order": eviction, "has_nodes": has_nodes}
            self.sides[incarnation] = Side(pool, PoolModel(NUM_BLOCKS, num_dram_blocks, scratch, **order))
        self.here, self.there = 3, 4
        self.touched = {3, 4}
        self.codes = {}  # prefix -> the number that stands for its KV
        self.connect(layout())

    def connect(self, layout):
        """Nothing to connect."""

    @rule()
    def face_the_other_pool(self):
        self.here, self.there = self.there, self.here

    @property
    def side(self):
        return self.sides[self.here]

    @property
    def pool(self):
        return self.side.pool

    @property
    def model(self):
        return self.side.model

    def compute(self, blocks, prefixes):
        """Writes the KV of these prefixes."""
        for block, prefix in zip(blocks, prefixes, strict=True):
            block.kv = self.code_of(prefix)
        self.side.write(blocks)

    def code_of(self, prefix):
        return self.codes.setdefault(prefix, len(self.codes) + 1)

    @invariant()
    def pools_and_models_agree(self):
        for number in self.touched | {self.here}:
            self.sides[number].check()
        self.touched.clear()


def refused(error, call):
    try:
        call()
    except error:
        return
    raise AssertionError(f"expected {error}")


def as_addrs(addrs):
    """int64 [n]; what cannot be that, as it is."""
    return np.array(addrs, dtype=np.int64) if isinstance(addrs, list) and set(map(type, addrs)) <= {int} else addrs


def addrs_of(blocks):
    return np.array([block.addr for block in blocks], dtype=np.int64)
