"""The figures of bench_mempool.py about index and allocator: what is timed, its goal, and the paper's (Fig. 9, 10).

Knows no command line and prints nothing. Prompts share nothing but what a case says; every call gets tokens of its own.
"""

import mmap
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from memserve.clock import monotonic_ns
from memserve.kvcache import Allocator, BlockPool, CacheGeometry, DiscreteLayout, Index, MemPool, RadixIndex
from memserve.kvcache.hash_index import HashIndex

BLOCK_SIZE = 16
PROMPT_BLOCKS = 256  # 4096 tokens
PERCENT_CACHED = (0, 50, 90, 100)
ALLOC_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FIG10_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PAPER_ALLOC_US = (6.2, 6.5, 8.3, 10.7, 15.5, 24.5, 41.9, 76.3, 144.8)
PAPER_FREE_US = {1: 5.8, 256: 105.6}
PAPER_MATCH_US = {0: 3.0, 100: 331.0}  # Fig. 9b, 256 blocks
PAPER_HASH_MS = (0.14, 0.24, 0.44, 1.03, 2.89, 9.03, 31.5, 120.4)
PAPER_RADIX_MS = (0.10, 0.10, 0.12, 0.15, 0.22, 0.36, 0.63, 1.18)
NUM_PAGES = 4096
RUNNING = (256, 4096)  # requests
HOLDER = ("request", "bench")


@dataclass(frozen=True)
class Figure:
    """One measured value. goal: what it should reach; at_least says from which side.  paper: what the paper shows."""

    part: str
    what: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = False
    paper: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class Prompts:
    """Seeded prompts of whole blocks; each call continues where the last one ended."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def new(self, num_blocks: int) -> np.ndarray:
        """int32 [num_blocks * BLOCK_SIZE]"""
        return self._rng.integers(0, 2**17, num_blocks * BLOCK_SIZE, dtype=np.int32)

    def beginning_with(self, prompt: np.ndarray, percent: int) -> np.ndarray:
        """As long as `prompt`, the first `percent` of its blocks the same."""
        num_same = len(prompt) // BLOCK_SIZE * percent // 100
        return np.concatenate([prompt[: num_same * BLOCK_SIZE], self.new(len(prompt) // BLOCK_SIZE - num_same)])

    def pick(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        return prompts[int(self._rng.integers(len(prompts)))]


def time_us(call: Callable[..., object], *arguments: object) -> float:
    start_ns = monotonic_ns()
    call(*arguments)
    return (monotonic_ns() - start_ns) / 1e3


def filled(index: Index, num_blocks: int, leaf_blocks: int, prompts: Prompts) -> list[np.ndarray]:
    """Fills an index with prompts of `leaf_blocks` blocks until `num_blocks` are cached; returns the prompts."""
    cached = [prompts.new(leaf_blocks) for _ in range(max(1, num_blocks // leaf_blocks))]
    for i, tokens in enumerate(cached):
        index.insert(tokens, np.arange(i * leaf_blocks, (i + 1) * leaf_blocks, dtype=np.int32))
    return cached


def page_us() -> float:
    """What the machine takes to hand out a page of 4 KB at its first touch: four of them are in a 4096-token key."""
    memory = mmap.mmap(-1, NUM_PAGES * mmap.PAGESIZE)

    def touch() -> None:
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1

    first_us = time_us(touch)
    return (first_us - time_us(touch)) / NUM_PAGES


def index_figures(sizes: Sequence[int], repeats: int, seed: int) -> Iterator[Figure]:
    """Match and insert of 4096-token prompts, by how much of them is cached and how many blocks are."""
    yield Figure("index", "a new page of memory on this machine", page_us(), "us")
    for size in sizes:
        prompts = Prompts(seed)
        _warm_up(prompts)
        index = RadixIndex(BLOCK_SIZE, np.ones(size, dtype=np.int32))
        cached = filled(index, size, PROMPT_BLOCKS, prompts)
        blocks = np.arange(PROMPT_BLOCKS, dtype=np.int32)
        for percent in PERCENT_CACHED:
            match_us, insert_us = [], []
            for _ in range(repeats):
                tokens = prompts.beginning_with(prompts.pick(cached), percent)
                match_us.append(time_us(index.match, tokens))
                tokens = prompts.beginning_with(prompts.pick(cached), percent)
                insert_us.append(time_us(index.insert, tokens, blocks))
            name, paper = f"{percent} % cached, {size:,} blocks", PAPER_MATCH_US.get(percent)
            yield Figure("index", f"match, {name}", median(match_us), "us", 15, paper=paper)
            yield Figure("index", f"insert, {name}", median(insert_us), "us", 25)


def list_figures(size: int, repeats: int, seed: int) -> Iterator[Figure]:
    """What a list of Python ints costs where an array costs nothing: MemPool.match of both."""
    prompts, pool = Prompts(seed), _pool(max(size, 2 * PROMPT_BLOCKS))
    cached = filled(pool.blocks.index, size, PROMPT_BLOCKS, prompts)
    for kind, convert in (("an array", np.asarray), ("a list", np.ndarray.tolist)):
        times = []
        for _ in range(repeats):
            tokens = convert(prompts.beginning_with(prompts.pick(cached), 50))
            times.append(time_us(pool.match, tokens))
        yield Figure("lists", f"MemPool.match of {kind}, 50 % cached", median(times), "us")


def fig10_figures(repeats: int, seed: int) -> Iterator[Figure]:
    """Match and insert of a prompt of which nothing is cached: the radix tree beside the hash of every prefix."""
    kinds: tuple[tuple[str, Any, Sequence[float]], ...] = (
        ("radix", RadixIndex, PAPER_RADIX_MS),
        ("hash", HashIndex, PAPER_HASH_MS),
    )
    for name, make, paper_ms in kinds:
        for num_tokens, paper in zip(FIG10_TOKENS, paper_ms, strict=True):
            prompts, num_blocks = Prompts(seed), num_tokens // BLOCK_SIZE
            index, blocks = make(BLOCK_SIZE, np.ones(num_blocks, dtype=np.int32)), np.arange(num_blocks, dtype=np.int32)
            times = []
            for _ in range(repeats):
                tokens = prompts.new(num_blocks)
                times.append(time_us(index.match, tokens) + time_us(index.insert, tokens, blocks))
            yield Figure("fig10", f"{name}, {num_tokens} tokens", median(times) / 1e3, "ms", paper=paper)


def alloc_figures(repeats: int) -> Iterator[Figure]:
    """Allocating and freeing, by the allocator in block numbers and by MemPool in checked addresses."""
    allocator, pool = Allocator(100_000), _pool(100_000)

    def bare(num_blocks: int) -> None:
        allocator.release(allocator.alloc(num_blocks, HOLDER), HOLDER)

    def whole(num_blocks: int) -> None:
        allocator.alloc(num_blocks, HOLDER)
        allocator.release_all(HOLDER)

    def checked(num_blocks: int) -> None:
        pool.free_mem(pool.alloc_mem(num_blocks, holder=HOLDER), holder=HOLDER)

    calls = (
        ("Allocator alloc + release", bare, 15),
        ("Allocator alloc + release_all", whole, 15),
        ("MemPool alloc_mem + free_mem", checked, 40),
    )
    for num_blocks, paper_us in zip(ALLOC_BLOCKS, PAPER_ALLOC_US, strict=True):
        paper = paper_us + PAPER_FREE_US[num_blocks] if num_blocks in PAPER_FREE_US else None
        largest = num_blocks == ALLOC_BLOCKS[-1]
        for name, call, goal_us in calls:
            value = median(time_us(call, num_blocks) for _ in range(repeats))
            yield Figure("alloc", f"{name}, {num_blocks}", value, "us", goal_us if largest else None, paper=paper)


def evict_figures(num_blocks: int, repeats: int, seed: int) -> Iterator[Figure]:
    """Blocks evicted a second from an index of 4096-token prompts: all at once, 16 at a time, 4 at a time.

    And the time of an eviction beside requests that run.
    """

    def evict_all(index: Index, step: int) -> None:
        for _ in range(0, index.num_blocks, step):
            index.evict(step)

    for name, step, goal in (("in bulk", num_blocks, 5.0), ("16 at a time", 16, 0.5), ("4 at a time", 4, 0.15)):
        rates = []
        for _ in range(repeats):
            index = RadixIndex(BLOCK_SIZE, np.ones(num_blocks, dtype=np.int32))
            filled(index, num_blocks, PROMPT_BLOCKS, Prompts(seed))
            rates.append(index.num_blocks / time_us(evict_all, index, step))
            assert index.num_blocks == 0
        yield Figure("evict", f"{name}, of {num_blocks:,} blocks", median(rates), "M/s", goal, at_least=True)
    for num_running in (0, *RUNNING):
        times = [_evict_beside_us(num_running, Prompts(seed)) for _ in range(repeats)]
        name = f"4 blocks, beside {num_running:,} colder requests that run"
        yield Figure("evict", name, median(times), "us")


def _evict_beside_us(num_running: int, prompts: Prompts) -> float:
    """An eviction while leaves that would go first are in use; the mean of 100 that follow one another."""
    num_blocks = 4 * (num_running + 101)
    refcounts = np.ones(num_blocks, dtype=np.int32)
    refcounts[: 4 * num_running] = 3
    index = RadixIndex(BLOCK_SIZE, refcounts)
    filled(index, num_blocks, 4, prompts)
    index.evict(4)

    def evict_all() -> None:
        for _ in range(100):
            index.evict(4)

    return time_us(evict_all) / 100


def grow_figures(repeats: int, seed: int) -> Iterator[Figure]:
    """What a request that enters its blocks as decoding fills them leaves behind: the time of all, of a match."""
    for num_blocks in (64, 512):
        tokens, blocks = Prompts(seed).new(num_blocks), np.arange(num_blocks, dtype=np.int32)
        insert_us, match_us = [], []

        def grow(index: Index, tokens: np.ndarray, blocks: np.ndarray) -> None:
            for end in range(1, len(blocks) + 1):
                index.insert(tokens[: end * BLOCK_SIZE], blocks[:end])

        for _ in range(repeats):
            index = RadixIndex(BLOCK_SIZE, np.ones(num_blocks, dtype=np.int32))
            insert_us.append(time_us(grow, index, tokens, blocks) / num_blocks)
            match_us.append(time_us(index.match, tokens))
        yield Figure("grow", f"insert of one block after the other, {num_blocks}, each", median(insert_us), "us")
        yield Figure("grow", f"match of what that made, {num_blocks} blocks", median(match_us), "us")


def memory_figures(num_blocks: int, seed: int) -> Iterator[Figure]:
    """Bytes of a cached block, everything counted: token ids, tree, reference counts, free stack."""
    for leaf_blocks in (PROMPT_BLOCKS, 64, 16):
        prompts, tables = Prompts(seed), []
        tracemalloc.start()
        pool = BlockPool(num_blocks, BLOCK_SIZE, RadixIndex)
        for _ in range(num_blocks // leaf_blocks):
            tables.append(pool.alloc(leaf_blocks, HOLDER))
            pool.publish(prompts.new(leaf_blocks), tables[-1])
            pool.release_all(HOLDER)
        tables.clear()
        num_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        goal = 100.0 if leaf_blocks == PROMPT_BLOCKS else None
        name = f"unique prompts of {leaf_blocks * BLOCK_SIZE} tokens"
        yield Figure("memory", name, num_bytes / pool.index.num_blocks, "bytes", goal)


def _warm_up(prompts: Prompts) -> None:
    """Runs the code once that the first figure would otherwise pay for."""
    index = RadixIndex(BLOCK_SIZE, np.ones(10 * PROMPT_BLOCKS, dtype=np.int32))
    for tokens in filled(index, 10 * PROMPT_BLOCKS, PROMPT_BLOCKS, prompts):
        index.match(prompts.beginning_with(tokens, 50))
    index.evict(index.num_blocks)


def _pool(num_blocks: int) -> MemPool:
    geometry = CacheGeometry(num_layers=1, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=1, dtype=torch.float16)
    return MemPool(geometry, DiscreteLayout(), num_blocks, RadixIndex)
