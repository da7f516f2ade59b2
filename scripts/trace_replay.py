"""Replay of a trace of prompts through match, alloc, insert and release, beside an exact LRU oracle. Prints nothing.

A trace line names the prompt's blocks of text by hash ids (Mooncake's format); here each id stands for 32 tokens of
its own, two blocks of 16. Time, lengths and answers of the trace are not used.
"""

import gc
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from pool_figures import BLOCK_SIZE, Figure

from memserve.clock import monotonic_ns
from memserve.kvcache import BlockPool, RadixIndex

TOKENS_PER_ID = 32
MOST_ID = (2**31 - 1) // TOKENS_PER_ID - 1  # of one whose tokens are int32
PERCENT_OF_UNIQUE = (1, 10, 30, 100)
GOAL_REQUESTS_PER_S = 12_000.0


@dataclass(frozen=True)
class Trace:
    """prompts: int32 [n] token ids each.  paths: of each prompt its blocks, numbered by their whole prefix."""

    name: str
    prompts: Sequence[np.ndarray]
    paths: Sequence[Sequence[int]]

    @property
    def num_unique_blocks(self) -> int:
        return 1 + max(path[-1] for path in self.paths)

    @property
    def num_blocks(self) -> int:
        return sum(len(path) for path in self.paths)


def load_trace(path: Path, most: int | None) -> Trace:
    """The first `most` requests of a JSONL file. Raises ValueError for a file without requests, or other lines."""
    with path.open(encoding="utf-8") as file:
        ids = [_ids(line, f"{path}:{number}") for number, line in enumerate(islice(file, most), start=1)]
    if not ids:
        raise ValueError(f"{path}: no requests in it")
    return _trace(path.name, ids)


def _ids(line: str, where: str) -> list[int]:
    """The hash_ids of a line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected an object with hash_ids ({error})") from error
    ids = record.get("hash_ids") if isinstance(record, dict) else None
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i <= MOST_ID for i in ids):
        raise ValueError(f"{where}: hash_ids={ids!r}: expected a list of integers from 0 to {MOST_ID}, at least one")
    return ids


def synthetic_trace(num_requests: int, seed: int) -> Trace:
    """Conversations that grow by a few ids a turn behind one of 20 shared heads, interleaved."""
    rng, next_id = np.random.default_rng(seed), 1000
    sessions: list[list[int]] = []
    ids = []
    for _ in range(num_requests):
        if not sessions or rng.random() < 0.3:
            sessions.append([int(rng.integers(20))])
        session = sessions[max(0, len(sessions) - 1 - int(rng.geometric(0.02)))]
        num_new = int(rng.integers(1, 12))
        session.extend(range(next_id, next_id + num_new))
        next_id += num_new
        ids.append(list(session))
    return _trace("synthetic conversations", ids)


def _trace(name: str, ids: Sequence[Sequence[int]]) -> Trace:
    within = np.arange(TOKENS_PER_ID, dtype=np.int32)
    prompts = [(np.array(i, dtype=np.int32)[:, None] * TOKENS_PER_ID + within).ravel() for i in ids]
    numbers: dict[tuple[int, int], int] = {}  # (block before, or -1; the id's part) -> block
    paths = []
    for prompt_ids in ids:
        path: list[int] = []
        for part in (TOKENS_PER_ID * i + start for i in prompt_ids for start in range(0, TOKENS_PER_ID, BLOCK_SIZE)):
            path.append(numbers.setdefault((path[-1] if path else -1, part), len(numbers)))
        paths.append(path)
    return Trace(name, prompts, paths)


def replay(trace: Trace, num_blocks: int) -> tuple[float, int]:
    """(seconds, blocks found cached) of all requests, one after the other, in a pool of `num_blocks` blocks."""
    pool, num_found = BlockPool(num_blocks, BLOCK_SIZE, RadixIndex), 0
    start_ns = monotonic_ns()
    for number, prompt in enumerate(trace.prompts):
        holder = ("request", number)
        cached = pool.match(prompt).blocks
        num_found += len(cached)
        pool.retain(cached, holder)
        new = pool.alloc(len(prompt) // BLOCK_SIZE - len(cached), holder)
        pool.publish(prompt, np.concatenate([cached, new]))
        pool.release_all(holder)
    seconds = (monotonic_ns() - start_ns) / 1e9
    pool.check()
    return seconds, num_found


def lru_oracle(paths: Sequence[Sequence[int]], num_blocks: int) -> int:
    """Blocks that an exact LRU over blocks finds, where only blocks that nothing cached continues may go.

    A request uses its whole path, so a block is never older than what continues it: with the deepest block of a path
    put in as its oldest, the oldest block of all is always a leaf.
    """
    cached: OrderedDict[int, None] = OrderedDict()
    num_found = 0
    for path in paths:
        found = next((i for i, block in enumerate(path) if block not in cached), len(path))
        num_found += found
        for block in reversed(path[:found]):
            cached.move_to_end(block)
        while len(cached) + len(path) - found > num_blocks:
            cached.popitem(last=False)
        for block in reversed(path):
            cached[block] = None
            cached.move_to_end(block)
    return num_found


def replay_figures(trace: Trace, repeats: int) -> Iterator[Figure]:
    """Requests a second and hit ratio, at capacities from 1 to 100 % of the trace's unique blocks.

    The trace itself is kept from Python's collector, whose passes over its million integers are not the pool's work.
    """
    gc.collect()
    gc.freeze()
    largest = max(len(path) for path in trace.paths)
    for percent in PERCENT_OF_UNIQUE:
        num_blocks = max(trace.num_unique_blocks * percent // 100, largest)
        runs = [replay(trace, num_blocks) for _ in range(repeats)]
        oracle = lru_oracle(trace.paths, num_blocks) / trace.num_blocks
        rates = sorted(len(trace.prompts) / seconds for seconds, _ in runs)
        name = f"{percent} % = {num_blocks:,} blocks"
        yield Figure("replay", name, rates[len(rates) // 2], "requests/s", GOAL_REQUESTS_PER_S, at_least=True)
        hit_ratio = runs[0][1] / trace.num_blocks
        yield Figure("replay", f"{name}, hit ratio", hit_ratio, "", oracle, at_least=True)
    gc.unfreeze()
