"""What an index must answer, spelled out: a dict from each cached block prefix to its block."""

import math
import random
from dataclasses import dataclass

import numpy as np

BLOCK = 4  # tokens in a block
ATTENTION_TOKENS, HORIZON = 3.7, 2.0  # of the cost-aware order: small enough to matter, and without equal keys


@dataclass
class Use:
    """born, last_used: index operations, counted from 1. start: tokens before the node that the block lies in."""

    born: int
    last_used: int
    start: int
    num_uses: int = 1


ORDERS = {
    "lru": lambda use: (use.last_used,),
    "lfu": lambda use: (use.num_uses, use.last_used),
    "fifo": lambda use: (use.born,),
    "cost_aware": lambda use: (use.last_used + HORIZON * math.log2(1 + use.start / ATTENTION_TOKENS),),
}


class BruteForceIndex:
    """Every cached prefix and how it was used. Evicts the first leaf of the order, the deepest of equal ones.

    refcounts: anything that maps a block to its number of holders, the index included.  has_nodes: blocks lie in nodes
    as in a path-compressed tree, cut where a request left an edge; else each is a node of its own.
    """

    def __init__(self, refcounts, block_size=BLOCK, order="lru", has_nodes=True):
        self.refcounts = refcounts
        self.block_size = block_size
        self.has_nodes = has_nodes
        self.blocks = {}  # prefix tuple -> block
        self.used = {}
        self.clock = 0
        self._key = ORDERS[order]

    def prefixes(self, tokens, limit=None):
        size = self.block_size
        end = len(tokens) if limit is None else min(len(tokens), limit)
        return [tuple(tokens[: i + size]) for i in range(0, end - end % size, size)]

    def match(self, tokens, limit=None):
        found = self._touch(tokens, limit)
        for prefix in found:
            self.used[prefix].num_uses += 1
        return [self.blocks[prefix] for prefix in found]

    def _touch(self, tokens, limit=None):
        self.clock += 1
        found = []
        for prefix in self.prefixes(tokens, limit):
            if prefix not in self.blocks:
                break
            self.used[prefix].last_used = self.clock
            found.append(prefix)
        if found and self.has_nodes:
            self._cut_after(found[-1])
        return found

    def _cut_after(self, end):
        for prefix, use in self.used.items():
            if prefix[: len(end)] == end != prefix and use.start == self.used[end].start:
                use.start = len(end)

    def insert(self, tokens, blocks):
        num_found, path = len(self._touch(tokens)), self.prefixes(tokens)
        for i, (prefix, block) in list(enumerate(zip(path, blocks, strict=True)))[num_found:]:
            self.blocks[prefix] = block
            start = num_found if self.has_nodes else i
            self.used[prefix] = Use(self.clock, self.clock, start * self.block_size)
        return [self.blocks[p] for p in path]

    def children(self, prefix):
        size = len(prefix) + self.block_size
        return [p for p in self.blocks if len(p) == size and p[: len(prefix)] == prefix]

    def evict(self, count, may_go=lambda block: True):
        gone = []
        while len(gone) < count:
            inner = {p[: -self.block_size] for p in self.blocks}
            alone = [p for p, block in self.blocks.items() if self.refcounts[block] == 1 and may_go(block)]
            leaves = [p for p in alone if p not in inner]
            if not leaves:
                break
            first = min(leaves, key=lambda p: self._key(self.used[p]))
            gone.append(self.blocks.pop(first))
            del self.used[first]
        return gone

    def uses(self, tokens):
        """Of each block of the longest cached prefix."""
        counts = []
        for prefix in self.prefixes(tokens):
            if prefix not in self.blocks:
                break
            counts.append(self.used[prefix].num_uses)
        return counts

    def next_out(self, count, known):
        """The block that `evict(count)` would take first of those not in `known`, and its prefix."""
        blocks, used = dict(self.blocks), dict(self.used)
        gone = self.evict(count)
        self.blocks, self.used = blocks, used
        prefix_of = {block: prefix for prefix, block in blocks.items()}
        return next(((prefix_of[block], block) for block in gone if not known[block]), None)

    def coldest(self, count, movable):
        """Blocks for which movable(block) holds and which nobody else holds: the first `count`, of any depth."""
        alone = [p for p, block in self.blocks.items() if movable(block) and self.refcounts[block] == 1]
        alone.sort(key=lambda p: (self._key(self.used[p]), -len(p)))
        return [self.blocks[p] for p in alone[:count]]

    def clear(self):
        gone = list(self.blocks.values())
        self.blocks.clear()
        self.used.clear()
        return gone

    def delete(self, tokens):
        found = self.match(tokens)
        path = self.prefixes(tokens)
        if not found or (len(found) < len(path) and self.children(path[len(found) - 1])):
            return []
        top = path[len(found) - 1]
        while len(top) > self.block_size and len(self.children(top[: -self.block_size])) == 1:
            top = top[: -self.block_size]
        gone = [p for p in self.blocks if p[: len(top)] == top]
        for prefix in gone:
            del self.used[prefix]
        return [self.blocks.pop(p) for p in gone]


def assert_agrees_with_brute_force(index_class, seed, num_operations=300):
    """Plays seeded random operations on an index and on the model, and compares every answer."""
    rng = random.Random(seed)
    refcounts = np.zeros(4000, dtype=np.int32)
    index, model = index_class(BLOCK, refcounts), BruteForceIndex(refcounts)
    next_block, index.counts_apart = 0, seed % 2 == 0
    for _ in range(num_operations):
        tokens = np.array([rng.randrange(3) for _ in range(rng.randrange(0, 40))], dtype=np.int32)
        action = rng.choice(["insert", "insert", "match", "limited", "evict", "delete", "hold"])
        if action == "insert":
            whole = tokens[: len(tokens) // BLOCK * BLOCK]
            blocks = np.arange(next_block, next_block + len(whole) // BLOCK, dtype=np.int32)
            next_block += len(blocks)
            before = index.num_blocks
            canonical = index.insert(whole, blocks)
            assert canonical.tolist() == model.insert(whole.tolist(), blocks.tolist())
            refcounts[canonical[len(canonical) - (index.num_blocks - before) :]] += 1
        elif action in ("match", "limited"):
            limit = rng.randrange(40) if action == "limited" else None
            m = model.match(tokens.tolist(), limit)
            for look in (index.peek, index.match):
                found = look(tokens, limit)
                assert found.blocks.tolist() == m and found.num_tokens == len(m) * BLOCK
            if index.ranks_blocks and index.counts_apart:
                assert index.uses(tokens).tolist() == model.uses(tokens.tolist())
        elif action == "hold":
            held = index.match(tokens).blocks
            model.match(tokens.tolist())
            refcounts[held] = 3 - refcounts[held[:1]] if len(held) else 0  # a whole prefix held, or let go of
        elif action == "evict":
            refcounts[:] = np.minimum(refcounts, 1) if rng.random() < 0.5 else refcounts
            count = rng.randrange(1, 6)
            if index.ranks_blocks:
                _assert_foresees(index, model, 2 * count, rng)
            gone = index.evict(count)
            assert gone.tolist() == model.evict(count)
            refcounts[gone] = 0
        else:
            assert sorted(index.delete(tokens).tolist()) == sorted(model.delete(tokens.tolist()))
        assert index.num_blocks == len(model.blocks)
    _assert_same_paths(index, model)
    assert sorted(index.clear().tolist()) == sorted(model.blocks.values()) and index.num_blocks == 0


def _assert_foresees(index, model, count, rng):
    """Whatever part of the cached prefixes is known already."""
    known = np.zeros(4000, dtype=bool)
    for prefix in sorted(model.blocks):
        if rng.random() < 0.5:
            known[[model.blocks[p] for p in model.prefixes(prefix)]] = True
    found, expected = index.next_out(count, known), model.next_out(count, known)
    assert (found is None) == (expected is None)
    if expected is not None:
        tokens, blocks = found
        assert tuple(tokens.tolist()) == expected[0] and blocks[-1] == expected[1]
        assert blocks.tolist() == [model.blocks[p] for p in model.prefixes(expected[0])]


def _assert_same_paths(index, model):
    reached = {tuple(tokens.tolist()): blocks.tolist() for tokens, blocks in index.iter_prefixes()}
    assert set(reached) == {prefix for prefix in model.blocks if not model.children(prefix)}
    for tokens, blocks in reached.items():
        assert [model.blocks[p] for p in model.prefixes(tokens)] == blocks
