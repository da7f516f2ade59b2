"""Occupancy: who holds an instance's blocks, over its run; occupancy.jsonl. Knows no clock and no picture.

An instance offers its pool after every change, and at most MAX_POINTS states are kept. Time is cut into buckets and the
first state of each bucket is kept; when the list is full, buckets double in length. The first, and not a minimum,
maximum or mean: a kept sample is one state that the pool was in, so its counts add up to the pool, and whatever falls
into a bucket that has its sample costs one comparison. What is lost is a spike shorter than a bucket (at most about a
250th of the run); the report's `peak_used_blocks` has that one.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memserve.clock import to_s
from memserve.kvcache.allocator import Allocator
from memserve.kvcache.block_pool import BlockPool

MAX_POINTS = 1000
TIERS = ("hbm", "dram")
KINDS = ("request", "both", "index", "swap", "transfer", "quarantine", "free")
# First words of holders that are shown as kinds; a block of several: the first.
_APART = ("quarantine", "transfer", "swap")


@dataclass(frozen=True)
class Sample:
    """Blocks of an instance at a time. Each tier has one count for each of KINDS; they sum to the tier's blocks.

    request: held for requests alone.  both: for requests, and cached.  index: cached alone, so evictable.
    swap, transfer, quarantine: by such a holder, whoever else holds them; a block on its way counts at both ends.
    """

    instance: str
    time_s: float
    hbm: dict[str, int]
    dram: dict[str, int]


class Occupancy:
    """The samples of one instance's pool, at most `max_points` of them (at least 2) and one more at the end."""

    def __init__(self, instance: str, pool: BlockPool, max_points: int = MAX_POINTS) -> None:
        if max_points < 2:
            raise ValueError(f"max_points={max_points}: expected an integer >= 2")
        self._instance = instance
        self._pool = pool
        self._max_points = max_points
        self._bucket_ns = 1
        self._due_ns = 0
        self._points: list[tuple[int, Sample]] = []

    def offer(self, now_ns: int) -> None:
        """Keeps the pool's state if it is the first of its bucket. Times must not decrease."""
        if now_ns < self._due_ns:
            return
        if len(self._points) == self._max_points:
            self._thin()
        self._points.append((now_ns, self._sample(now_ns)))
        self._due_ns = (now_ns // self._bucket_ns + 1) * self._bucket_ns

    def samples(self, end_ns: int) -> list[Sample]:
        """Everything kept, in order of time, and the pool as it is now, at the run's end."""
        return [sample for _, sample in self._points] + [self._sample(end_ns)]

    def _thin(self) -> None:
        """Doubles the buckets until at most half of the points are left."""
        self._bucket_ns = max(self._bucket_ns, self._points[-1][0] // self._max_points)
        while len(self._points) > self._max_points // 2:
            self._bucket_ns *= 2
            firsts: dict[int, tuple[int, Sample]] = {}
            for point in self._points:
                firsts.setdefault(point[0] // self._bucket_ns, point)
            self._points = list(firsts.values())

    def _sample(self, now_ns: int) -> Sample:
        hbm, dram = count_blocks(self._pool)
        return Sample(self._instance, to_s(now_ns), hbm, dram)


def count_blocks(pool: BlockPool) -> tuple[dict[str, int], dict[str, int]]:
    """The blocks of HBM and of DRAM by kind. From the allocator's counters: of HBM's it looks only at those that move
    or are in quarantine.
    """
    a = pool.allocator
    dram_indexed = int(np.count_nonzero(a.refcounts[a.num_blocks :] & 1)) if a.num_dram_blocks else 0
    hbm_indexed = pool.index.num_blocks - dram_indexed
    hbm = _by_kind(a.num_blocks, a.num_free, a.num_index_only, hbm_indexed)
    dram = _by_kind(a.num_dram_blocks, a.num_free_dram, a.num_index_only_dram, dram_indexed)
    _set_apart(a, hbm, dram)
    return hbm, dram


def _by_kind(num_blocks: int, num_free: int, num_index_only: int, num_indexed: int) -> dict[str, int]:
    counts = dict.fromkeys(KINDS, 0)
    counts |= {"index": num_index_only, "both": num_indexed - num_index_only, "free": num_free}
    counts["request"] = num_blocks - num_free - num_indexed
    return counts


def _set_apart(allocator: Allocator, hbm: dict[str, int], dram: dict[str, int]) -> None:
    """Moves the blocks of swaps, of transfers and of the quarantine from the kinds that they were counted as."""
    held = [
        (_APART.index(str(holder[0])), allocator.held_by(holder))
        for holder in allocator.named_holders()
        if holder[0] in _APART
    ]
    if not held:
        return
    held.sort(key=lambda part: part[0])
    ranks, parts = zip(*held, strict=True)
    blocks, first = np.unique(np.concatenate(parts), return_index=True)
    rank_of = np.repeat(ranks, [len(part) for part in parts])[first]
    is_cached = (allocator.refcounts[blocks] & 1).astype(bool)
    is_dram = blocks >= allocator.num_blocks
    for tier, in_tier in ((hbm, ~is_dram), (dram, is_dram)):
        for rank, word in enumerate(_APART):
            members = in_tier & (rank_of == rank)
            num_cached = int(np.count_nonzero(members & is_cached))
            tier[word] = int(np.count_nonzero(members))
            tier["both"] -= num_cached
            tier["request"] -= tier[word] - num_cached


def occupancy_lines(samples: Iterable[Sample]) -> Iterator[str]:
    """The lines of occupancy.jsonl, each with its line end."""
    for sample in samples:
        yield json.dumps(vars(sample), ensure_ascii=False, allow_nan=False) + "\n"


def load_occupancy(directory: Path | str) -> list[Sample]:
    """The samples in a run's output directory. Raises OSError if it has no occupancy.jsonl, ValueError for another."""
    path = Path(directory) / "occupancy.jsonl"
    try:
        return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected what a run wrote ({error})") from error
