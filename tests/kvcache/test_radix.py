"""RadixIndex against a brute-force model: a dict from each cached block prefix to its block."""

import random

import numpy as np
import pytest

from memserve.kvcache import RadixIndex

BLOCK = 4


class BruteForceIndex:
    """Every cached prefix spelled out. Ages are per block; evicts the oldest leaf, the deepest of equally old ones."""

    def __init__(self, refcounts):
        self.refcounts = refcounts
        self.blocks = {}  # prefix tuple -> block
        self.used = {}
        self.clock = 0

    def _prefixes(self, tokens, limit=None):
        end = len(tokens) if limit is None else min(len(tokens), limit)
        return [tuple(tokens[: i + BLOCK]) for i in range(0, end - end % BLOCK, BLOCK)]

    def match(self, tokens, limit=None):
        self.clock += 1
        found = []
        for prefix in self._prefixes(tokens, limit):
            if prefix not in self.blocks:
                break
            self.used[prefix] = self.clock
            found.append(self.blocks[prefix])
        return found

    def insert(self, tokens, blocks):
        found = self.match(tokens)
        for prefix, block in list(zip(self._prefixes(tokens), blocks, strict=True))[len(found) :]:
            self.blocks[prefix], self.used[prefix] = block, self.clock
        return [self.blocks[p] for p in self._prefixes(tokens)]

    def _children(self, prefix):
        return [p for p in self.blocks if len(p) == len(prefix) + BLOCK and p[: len(prefix)] == prefix]

    def evict(self, count):
        gone = []
        while len(gone) < count:
            leaves = [p for p in self.blocks if not self._children(p) and self.refcounts[self.blocks[p]] == 1]
            if not leaves:
                break
            oldest = min(leaves, key=lambda p: self.used[p])
            gone.append(self.blocks.pop(oldest))
            del self.used[oldest]
        return gone

    def delete(self, tokens):
        found = self.match(tokens)
        path = self._prefixes(tokens)
        if not found or (len(found) < len(path) and self._children(path[len(found) - 1])):
            return []
        top = path[len(found) - 1]
        while len(top) > BLOCK and len(self._children(top[:-BLOCK])) == 1:
            top = top[:-BLOCK]
        gone = [p for p in self.blocks if p[: len(top)] == top]
        for prefix in gone:
            del self.used[prefix]
        return [self.blocks.pop(p) for p in gone]


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_agree_with_brute_force(seed):
    rng = random.Random(seed)
    refcounts = np.zeros(4000, dtype=np.int32)
    index, model = RadixIndex(BLOCK, refcounts), BruteForceIndex(refcounts)
    next_block = 0
    for _ in range(300):
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
            assert index.peek(tokens, limit) == len(m := model.match(tokens.tolist(), limit)) * BLOCK
            found = index.match(tokens, limit)
            assert found.blocks.tolist() == m and found.num_tokens == len(m) * BLOCK
        elif action == "hold":
            held = index.match(tokens).blocks
            model.match(tokens.tolist())
            refcounts[held] = 3 - refcounts[held[:1]] if len(held) else 0  # a whole prefix held, or let go of
        elif action == "evict":
            refcounts[:] = np.minimum(refcounts, 1) if rng.random() < 0.5 else refcounts
            count = rng.randrange(1, 6)
            gone = index.evict(count)
            assert gone.tolist() == model.evict(count)
            refcounts[gone] = 0
        else:
            assert sorted(index.delete(tokens).tolist()) == sorted(model.delete(tokens.tolist()))
        assert index.num_blocks == len(model.blocks)
    reached = {tuple(t.tolist()): b.tolist() for t, b in index.iter_prefixes()}
    for tokens, blocks in reached.items():
        assert [model.blocks[p] for p in model._prefixes(tokens)] == blocks
    assert sorted(index.clear().tolist()) == sorted(model.blocks.values()) and index.num_blocks == 0


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
