import functools

import numpy as np
import pytest

from memserve.kvcache import LRU, RadixIndex
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import MissedEvents
from memserve.messages import pack_tokens
from memserve.sched.prompt_tree import Exact, NoPromptTree, Optimistic
from memserve.sched.shared_tree import SharedTree

BLOCK = 4
SECOND = 10**9


def path(*tokens):
    return pack_tokens(np.array(tokens))


def random_path(rng, most_blocks=6):
    """Few different blocks, so that paths share prefixes."""
    blocks = rng.integers(0, 3, int(rng.integers(1, most_blocks + 1)))
    return pack_tokens(np.repeat(blocks, BLOCK))


class Sets:
    """What SharedTree is, as a set of prefixes for each row."""

    def __init__(self, num_rows):
        self.held = [set() for _ in range(num_rows)]

    def hold(self, row, data):
        self.held[row] |= {data[:end] for end in range(16, len(data) + 1, 16)}

    def cut(self, row, data, keep):
        gone = {p for p in self.held[row] if len(p) > keep and p[: keep + 16] == data[: keep + 16]}
        self.held[row] -= gone

    def match(self, data):
        return [max([len(p) // 4 for p in held if data.startswith(p)], default=0) for held in self.held]


@pytest.mark.parametrize("seed", range(4))
def test_the_shared_tree_is_a_set_of_prefixes_for_each_instance(seed):
    rng = np.random.default_rng(seed)
    tree, sets = SharedTree(5, BLOCK), Sets(5)
    for _ in range(600):
        row, data = int(rng.integers(5)), random_path(rng)
        action = rng.random()
        if action < 0.5:
            tree.hold(row, data, 0)
            sets.hold(row, data)
        elif action < 0.98:
            held = [p for p in sets.held[row] if data.startswith(p)]
            data = max(held, key=len, default=b"")
            if data:
                keep = 16 * int(rng.integers(0, len(data) // 16))
                tree.cut(row, data, keep)
                sets.cut(row, data, keep)
        else:
            tree.purge(row)
            sets.held[row].clear()
        tree.check()
        asked = random_path(rng) + path(1, 2)  # an incomplete block never counts
        assert tree.match(asked).tolist() == sets.match(asked)
    assert tree.num_blocks == [len(held) for held in sets.held]


def test_neighbours_with_the_same_holders_are_one_node():
    tree, whole = SharedTree(2, BLOCK), path(*range(40))
    tree.hold(0, whole, 0)
    tree.hold(1, whole, 0)
    for end in range(len(whole), 0, -16):
        tree.cut(1, whole[:end], end - 16)
        assert tree.num_nodes <= 2
    assert tree.num_nodes == 1 and tree.match(whole).tolist() == [40, 0]


def test_an_optimistic_tree_forgets_what_nobody_used_for_its_time_to_live():
    tree = Optimistic(2, BLOCK, ttl_s=10)
    tree.learn(0, path(*range(8)), 0)
    tree.learn(1, path(*range(12)), 0)
    tree.learn(1, path(*range(6)), 5 * SECOND)  # renews its first block alone
    assert tree.match(path(*range(20)), 10 * SECOND).tolist() == [8, 12]
    assert tree.match(path(*range(20)), 11 * SECOND).tolist() == [0, 4]
    assert tree.match(path(*range(20)), 16 * SECOND).tolist() == [0, 0]
    assert tree.num_blocks == 0 and tree.num_expired_blocks == 5 and tree.num_evicted_blocks == 0
    tree.check()


def test_an_optimistic_tree_keeps_to_its_size_and_forgets_the_least_recently_used_from_the_end():
    tree = Optimistic(2, BLOCK, max_blocks=4)
    tree.learn(0, path(*range(12)), 0)
    tree.learn(1, path(*range(12)), 1)
    tree.learn(0, path(*range(100, 108)), 2)
    assert tree.match(path(*range(12)), 3).tolist() == [8, 12]
    tree.learn(0, path(*range(8)), 3)
    tree.learn(0, path(*range(200, 204)), 4)
    assert tree.match(path(*range(100, 108)), 5).tolist() == [4, 0]
    assert tree.num_blocks == 7 and tree.num_evicted_blocks == 2
    tree.check()


@pytest.mark.parametrize("seed", range(3))
def test_an_optimistic_tree_keeps_its_books_whatever_it_learns(seed):
    rng = np.random.default_rng(seed)
    tree, now_ns = Optimistic(4, BLOCK, ttl_s=1, max_blocks=9), 0
    for _ in range(800):
        now_ns += int(rng.integers(0, SECOND // 20))
        tree.learn(int(rng.integers(4)), random_path(rng), now_ns)
        if rng.random() < 0.01:
            tree.purge(int(rng.integers(4)))
        tree.match(random_path(rng), now_ns)
        tree.check()
        assert tree.num_blocks <= 36
    tree.match(b"", now_ns + 2 * SECOND)
    assert tree.num_blocks == 0


def test_a_block_forgotten_and_learned_again_and_again_has_one_entry():
    tree, blocks = Optimistic(3, BLOCK, ttl_s=1e6, max_blocks=3), [path(*[i] * BLOCK) for i in range(4)]
    for i in range(400):
        tree.learn(0, blocks[i % 4], 2 * i)
        tree.learn(1, blocks[(i + 2) % 4], 2 * i + 1)
        tree.check()
    assert [len(heap) for heap in tree._oldest] == [3, 3, 0] and tree.num_blocks == 6


def test_who_splits_a_node_that_others_hold_has_one_entry_for_its_head():
    tree = Optimistic(2, BLOCK)
    tree.learn(0, path(*range(12)), 0)
    tree.learn(1, path(*range(4), *range(50, 54)), 1)
    tree.check()
    assert [len(heap) for heap in tree._oldest] == [2, 2]


def pools(num_pools, num_blocks):
    index = functools.partial(RadixIndex, eviction=LRU())
    return [BlockPool(num_blocks, BLOCK, index) for _ in range(num_pools)]


def compute(pool, tokens, name):
    """A request that computes its prompt, indexes it and leaves."""
    holder = ("request", name, 0)
    blocks = pool.alloc(len(tokens) // BLOCK, holder)
    pool.publish(tokens, blocks)
    pool.release_all(holder)


def test_an_exact_tree_says_what_every_instances_own_index_would():
    rng = np.random.default_rng(1)
    tree, instances = Exact(3, BLOCK), pools(3, 12)
    for pool in instances:
        pool.follow()
    for step in range(400):
        row = int(rng.integers(3))
        tokens = np.frombuffer(random_path(rng), "<i4")
        compute(instances[row], tokens, str(step))
        if rng.random() < 0.02:
            instances[row].clear()
        events = instances[row].drain_events()
        tree.apply(row, events)
        tree.apply(row, events)  # a repeat changes nothing
        asked = random_path(rng)
        expected = [pool.index.peek(np.frombuffer(asked, "<i4")).num_tokens for pool in instances]
        assert tree.match(asked, 0).tolist() == expected
        tree.check()
    assert sum(pool.stats().num_evicted for pool in instances) > 50


def test_an_exact_tree_asks_for_a_snapshot_after_a_gap_and_after_a_purge():
    rng = np.random.default_rng(2)
    tree, (pool,) = Exact(1, BLOCK), pools(1, 12)
    pool.follow()
    for step in range(5):
        compute(pool, np.frombuffer(random_path(rng), "<i4"), str(step))
    first, *rest = pool.drain_events()
    tree.apply(0, [first])
    with pytest.raises(MissedEvents):
        tree.apply(0, rest[1:])
    tree.rebuild(0, pool.follow())
    assert tree.num_blocks == pool.index.num_blocks
    tree.purge(0)
    compute(pool, np.arange(4, dtype=np.int32) + 50, "late")
    with pytest.raises(MissedEvents):
        tree.apply(0, pool.drain_events())
    assert tree.num_blocks == 0


def test_no_prompt_tree_believes_nothing():
    tree = NoPromptTree(2, BLOCK)
    tree.learn(0, path(*range(8)), 0)
    assert tree.match(path(*range(8)), 0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl_s": 0}, "ttl_s=0: expected a number of seconds in"),
        ({"ttl_s": float("inf")}, "ttl_s=inf"),
        ({"max_blocks": 0}, "max_blocks=0: expected an integer >= 1"),
    ],
)
def test_bounds_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Optimistic(1, BLOCK, **options)
