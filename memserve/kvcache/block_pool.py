"""BlockPool: allocator and index working together, in block numbers. Never sees a tensor, an address or the network.

What the local scheduler uses. Its one rule: allocating evicts what only the index holds, before it says OutOfBlocks.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memserve.kvcache.allocator import INDEX, Allocator, Holder
from memserve.kvcache.errors import BrokenInvariant, OutOfBlocks
from memserve.kvcache.index import Index, Match


class IndexFactory(Protocol):
    """Builds an index over an allocator's reference counts (int32 [num_blocks])."""

    def __call__(self, block_size: int, refcounts: np.ndarray) -> Index: ...


@dataclass(frozen=True)
class PoolStats:
    """Blocks now, and counts since the pool was made. peak_used: most blocks that requests held at a time."""

    num_blocks: int
    num_free: int
    num_indexed: int
    num_evictable: int
    num_evicted: int
    num_allocated: int
    peak_used: int


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, and the index over what they cache."""

    def __init__(self, num_blocks: int, block_size: int, index: IndexFactory) -> None:
        self.block_size = block_size
        self.allocator = Allocator(num_blocks)
        self.index = index(block_size, self.allocator.refcounts)
        self._num_evicted = 0
        self._num_allocated = 0
        self._peak_used = 0

    @property
    def num_blocks(self) -> int:
        return self.allocator.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `alloc` could hand out now: free, or held by the index alone.

        The latter can go only from the leaves up, so this holds as long as whoever holds a cached block also holds the
        cached blocks before it, as every request does.
        """
        return self.allocator.num_free + self.allocator.num_index_only

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def alloc(self, num_blocks: int, holder: Holder) -> np.ndarray:
        """Exactly `num_blocks` blocks, int32, evicting from the index as needed.

        Raises OutOfBlocks, with nothing allocated.
        """
        if num_blocks > self.num_available:
            allocator = self.allocator
            raise OutOfBlocks(
                f"{num_blocks} blocks asked for by {holder}: {allocator.num_free} free and "
                f"{allocator.num_index_only} evictable of {allocator.num_blocks}"
            )
        self._evict(num_blocks - self.allocator.num_free)
        blocks = self.allocator.alloc(num_blocks, holder)
        self._num_allocated += num_blocks
        self._peak_used = max(self._peak_used, self.num_blocks - self.num_available)
        return blocks

    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        """The longest cached prefix of tokens[:limit]. Holds nothing: retain before the next call."""
        return self.index.match(tokens, limit)

    def retain(self, blocks: np.ndarray, holder: Holder) -> None:
        self.allocator.retain(blocks, holder)

    def release(self, blocks: np.ndarray, holder: Holder) -> None:
        self.allocator.release(blocks, holder)

    def release_all(self, holder: Holder) -> int:
        """Gives up everything `holder` holds; returns how many blocks that was."""
        return self.allocator.release_all(holder)

    def publish(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Enters computed KV into the index (whole blocks: len(tokens) == len(blocks) * block_size).

        Returns the canonical blocks, int32 [n]: where somebody cached the same prefix first, theirs. The caller keeps
        its duplicates (tables are append-only) and retains the canonical ones, so that nothing below a prefix in use
        counts as evictable.
        """
        before = self.index.num_blocks
        canonical = self.index.insert(tokens, blocks)
        num_new = self.index.num_blocks - before
        self.allocator.retain(canonical[len(canonical) - num_new :], INDEX)
        return canonical

    def delete(self, tokens: np.ndarray) -> int:
        """Drops a prompt's cached data; returns how many blocks left the index."""
        gone = self.index.delete(tokens)
        self.allocator.release(gone, INDEX)
        return len(gone)

    def clear(self) -> int:
        """Empties the index; returns how many blocks left it."""
        gone = self.index.clear()
        self.allocator.release(gone, INDEX)
        return len(gone)

    def _evict(self, num_blocks: int) -> None:
        if num_blocks <= 0:
            return
        gone = self.index.evict(num_blocks)
        self.allocator.release(gone, INDEX)
        self._num_evicted += len(gone)
        if len(gone) < num_blocks:
            raise OutOfBlocks(
                f"{num_blocks} cached blocks had to go and {len(gone)} could: others lie above blocks that are in use"
            )

    def stats(self) -> PoolStats:
        allocator = self.allocator
        return PoolStats(
            num_blocks=allocator.num_blocks,
            num_free=allocator.num_free,
            num_indexed=self.index.num_blocks,
            num_evictable=allocator.num_index_only,
            num_evicted=self._num_evicted,
            num_allocated=self._num_allocated,
            peak_used=self._peak_used,
        )

    def check(self) -> None:
        """Raises BrokenInvariant unless allocator, ledger and index agree."""
        self.allocator.check()
        indexed = self.allocator.held_by(INDEX)
        paths = [blocks for _, blocks in self.index.iter_prefixes()]
        reachable = np.unique(np.concatenate(paths)) if paths else np.empty(0, dtype=np.int32)
        if len(indexed) != self.index.num_blocks or not np.array_equal(np.sort(indexed), reachable):
            raise BrokenInvariant(f"the index reaches {len(reachable)} blocks and holds {len(indexed)}")
