"""BlockPool: allocator and index working together, in block numbers. Never sees a tensor, an address or the network.

What the local scheduler uses. Its one rule: allocating evicts what only the index holds, before it says OutOfBlocks.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import INDEX, Allocator, Holder
from memserve.kvcache.copy_engine import AtOnce, CopyEngine, NothingToCopy
from memserve.kvcache.errors import BrokenInvariant, OutOfBlocks
from memserve.kvcache.events import EventRecorder, IndexEvent, IndexSnapshot
from memserve.kvcache.index import Index, Match, require_block_size
from memserve.kvcache.pool_stats import PoolStats
from memserve.kvcache.swaps import Swap, Swaps

_NOTHING = np.empty(0, dtype=np.int32)


class IndexFactory(Protocol):
    """Builds an index over an allocator's reference counts (int32 [all blocks], those in HBM first)."""

    def __call__(self, block_size: int, refcounts: np.ndarray, *, num_hbm_blocks: int) -> Index: ...


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens in HBM, `num_dram_blocks` in DRAM, and the index over what they cache.

    engine: copies contents between blocks; by default none.  is_followed: somebody is told what the index has. Raises
    ValueError for sizes out of range, and no index.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        index: IndexFactory,
        *,
        num_dram_blocks: int = 0,
        engine: CopyEngine | None = None,
    ) -> None:
        if not callable(index):
            raise ValueError(f"index={index!r}: expected what makes an index, such as the class RadixIndex")
        self.block_size = require_block_size(block_size)
        self.allocator = Allocator(num_blocks, num_dram_blocks)
        self.index = index(block_size, self.allocator.refcounts, num_hbm_blocks=num_blocks)
        self._swaps = Swaps(self.allocator, self.index, engine or AtOnce(NothingToCopy()))
        self._events, self.is_followed = EventRecorder(block_size, num_blocks), False
        self._now_ns = 0
        self._num_evicted = self._num_allocated = self._peak_used = 0

    @property
    def num_blocks(self) -> int:
        """Blocks in HBM; higher block numbers lie in DRAM."""
        return self.allocator.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks in HBM that `alloc` could hand out now: free, or held by the index alone. These go from the leaves up:
        whoever holds a cached block is to hold those before it (not its own copies of them), or `alloc` can give fewer.
        """
        return self.allocator.num_free + self.allocator.num_index_only

    @property
    def num_unmoved(self) -> int:
        """Of these, the blocks that `alloc` could hand out while none moves to DRAM."""
        return self.allocator.num_free if self.allocator.num_dram_blocks else self.num_available

    @property
    def followers(self) -> list[Callable[[np.ndarray, np.ndarray], None]]:
        """Called with (blocks in DRAM that others use, the copies that the index has from now on), int32 [n] each."""
        return self._swaps.followers

    @property
    def num_waited(self) -> int:
        """Blocks moved between the media, both ways, while somebody waited: all, unless copies go on beside compute."""
        return self._swaps.num_waited

    @property
    def waited_ns(self) -> int:
        """How long they did on the machine's clock, where blocks are copied at once."""
        return self._swaps.waited_ns

    @property
    def num_swapping(self) -> int:
        """Swaps that have not ended."""
        return len(self._swaps.open)

    @property
    def next_time_ns(self) -> int | None:
        """When the first of them ends, if anything is known of that."""
        return self._swaps.next_time_ns

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def fits(self, blocks: np.ndarray, num_tokens: int, num_kept: int) -> bool:
        """Whether HBM has room for those of `blocks` (int32 [n]) in DRAM, what else `num_tokens` need, and num_kept."""
        num_new = max(self.blocks_for(num_tokens) - len(blocks), 0)
        return int(np.count_nonzero(blocks >= self.num_blocks)) + num_new + num_kept <= self.num_available

    def alloc(self, num_blocks: int, holder: Holder, medium: Medium = Medium.HBM) -> np.ndarray:
        """Exactly `num_blocks` blocks, int32. What only the index holds makes room: moved to DRAM, else evicted.
        Raises OutOfBlocks, with nothing allocated.
        """
        self.make_room(num_blocks, holder, medium)
        blocks = self.allocator.alloc(num_blocks, holder, medium)
        self._num_allocated += num_blocks
        self._peak_used = max(self._peak_used, self.num_blocks - self.num_available)
        return blocks

    def swap_out(self, num_blocks: int) -> Swap:
        """Moves what eviction would take first in HBM to DRAM, as far as DRAM has free blocks (Table 1)."""
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks}: expected an integer >= 0")
        blocks = self.index.coldest(min(num_blocks, self.allocator.num_free_dram))
        return self._swaps.begin(blocks, Medium.DRAM, INDEX, self._now_ns)

    def swap_in(self, blocks: np.ndarray, holder: Holder) -> Swap:
        """Brings those of `blocks` that lie in DRAM back to HBM; `holder` holds them all, before and after.

        The index follows. Others that hold a block keep theirs in DRAM. Raises OutOfBlocks, with nothing moved.
        """
        in_dram = blocks[blocks >= self.num_blocks]
        self.make_room(len(in_dram), holder)
        self._peak_used = max(self._peak_used, self.num_blocks - self.num_available + len(in_dram))
        return self._swaps.begin(in_dram, Medium.HBM, holder, self._now_ns)

    def move_out(self, blocks: np.ndarray, holder: Holder) -> np.ndarray | None:
        """Moves a request's blocks to DRAM, except those that others use too; None, with none moved, if DRAM is full.

        Waits for the copy. Returns the blocks, int32 [n], with the moved ones in place, all held by `holder` still.
        """
        alone = blocks[(self.allocator.refcounts[blocks] <= 3) & (blocks < self.num_blocks)]
        try:
            self.make_room(len(alone), holder, Medium.DRAM)
        except OutOfBlocks:
            return None
        swap = self._swaps.begin(alone, Medium.DRAM, holder, self._now_ns)
        self._swaps.end(swap)
        return swap.replaced(blocks)

    def swap_ahead(self, num_blocks: int) -> None:
        """Begins to move what eviction would take first to DRAM, while less than `num_blocks` of HBM will be free."""
        if num_blocks:
            leaving = sum(len(s.sources) for s in self._swaps.open if self._frees(s, Medium.HBM))
            self.swap_out(max(0, num_blocks - self.allocator.num_free - leaving))

    def poll(self, now_ns: int) -> None:
        """Sets the time of the calls that follow, in ns; ends the swaps whose copies have ended by it."""
        self._now_ns = now_ns
        self._swaps.end_due(now_ns)

    def wait(self) -> None:
        """Waits for every swap that has not ended."""
        self._swaps.end_all()

    def swap_in_of(self, blocks: np.ndarray) -> Swap | None:
        """The first open swap that brings any of `blocks` (int32 [n]) to HBM."""
        ups = (swap for swap in self._swaps.open if self._frees(swap, Medium.DRAM))
        return next((swap for swap in ups if np.isin(swap.sources, blocks).any()), None)

    def are_swapping(self, blocks: np.ndarray) -> np.ndarray:
        """bool [n]: which of `blocks` an open swap takes elsewhere."""
        return np.isin(blocks, np.concatenate([_NOTHING, *(swap.sources for swap in self._swaps.open)]))

    def _frees(self, swap: Swap, medium: Medium) -> bool:
        """Whether a move's end frees blocks of a medium."""
        return bool(swap.sources[0] >= self.num_blocks) == bool(medium)

    def make_room(self, num_blocks: int, holder: Holder, medium: Medium = Medium.HBM) -> None:
        """Frees blocks of a medium until `num_blocks` are free, as many calls for fewer would. Raises OutOfBlocks.

        What is leaving it anyway goes first. HBM's blocks move to DRAM while that has room, and when it has none the
        coldest leaves go, wherever they lie. For room in DRAM alone its own go; what lies in HBM only from above them.
        """
        free, evictable, capacity = self._room(medium)
        if num_blocks > free + evictable and self._swaps.end_all():
            free, evictable, _ = self._room(medium)
        if num_blocks > free + evictable:
            raise OutOfBlocks(
                f"{num_blocks} blocks in {medium.name} asked for by {holder}: {free} free and {evictable} evictable "
                f"of {capacity}"
            )
        while (short := num_blocks - self._room(medium)[0]) > 0:
            if self._swaps.open and self._swaps.end_all(lambda swap: self._frees(swap, medium)):
                continue
            if medium is Medium.HBM and self.allocator.num_free_dram and self._swap_out_at_once(short):
                continue
            of = None if medium is Medium.HBM and self.index.moves_blocks else medium
            if not (self._evict(short, of) or self._evict(short) or self._swaps.end_all()):
                raise OutOfBlocks(f"{short} more cached blocks had to go, but lie above blocks that are in use")

    def _room(self, medium: Medium) -> tuple[int, int, int]:
        """Free blocks of a medium, those that only the index holds, and all."""
        a = self.allocator
        if medium:
            return a.num_free_dram, a.num_index_only_dram, a.num_dram_blocks
        return a.num_free, a.num_index_only, a.num_blocks

    def _swap_out_at_once(self, num_blocks: int) -> int:
        swap = self.swap_out(num_blocks)
        self._swaps.end(swap)
        return len(swap.arrived)

    def _evict(self, num_blocks: int, medium: Medium | None = None) -> int:
        gone = self.index.evict(num_blocks, medium)
        self.allocator.evicted(gone)
        self._num_evicted += len(gone)
        return len(gone)

    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        """The longest cached prefix of tokens[:limit]. Holds nothing: retain before the next call."""
        return self.index.match(tokens, limit)

    def retain(self, blocks: np.ndarray, holder: Holder) -> None:
        self.allocator.retain(blocks, holder)
        self._peak_used = max(self._peak_used, self.num_blocks - self.num_available)

    def hold(self, blocks: np.ndarray, holder: Holder) -> None:
        """Retains those of `blocks` (int32 [n], each once) that `holder` has not yet."""
        self.retain(blocks[~self.allocator.find(blocks, holder)[2]], holder)

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
        if not self.allocator.num_dram_blocks:
            return canonical
        better = (canonical >= self.num_blocks) & (blocks < self.num_blocks)
        better &= (self.allocator.refcounts[blocks] & 1) == 0  # a block is cached in one place only
        if not better.any():
            return canonical
        self._swaps.displace(canonical[better], blocks[better])  # by the caller's copies
        return np.where(better, blocks, canonical)

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

    def follow(self) -> IndexSnapshot:
        """What the index holds; from now on changes are recorded for `drain_events`. Who missed some calls it again."""
        self.index.log, self.is_followed = self._events, True
        return self._events.snapshot(self.index.iter_prefixes())

    def drain_events(self) -> list[IndexEvent]:
        """The index's changes since the last call, oldest first; none unless somebody follows."""
        return self._events.drain()

    def stats(self) -> PoolStats:
        """How full the pool is, and what it has done."""
        allocator = self.allocator
        return PoolStats(
            num_blocks=allocator.num_blocks,
            num_free=allocator.num_free,
            num_evictable=allocator.num_index_only,
            num_indexed=self.index.num_blocks,
            num_evicted=self._num_evicted,
            num_allocated=self._num_allocated,
            peak_used=self._peak_used,
            num_dram_blocks=allocator.num_dram_blocks,
            num_free_dram=allocator.num_free_dram,
            num_evictable_dram=allocator.num_index_only_dram,
            num_swapped_out=self._swaps.num_out,
            num_swapped_in=self._swaps.num_in,
        )

    def check(self) -> None:
        """Raises BrokenInvariant unless allocator, ledger and index agree."""
        self.allocator.check()
        indexed = self.allocator.held_by(INDEX)
        reachable = np.unique(np.concatenate([_NOTHING, *(blocks for _, blocks in self.index.iter_prefixes())]))
        if len(indexed) != self.index.num_blocks or not np.array_equal(np.sort(indexed), reachable):
            raise BrokenInvariant(f"the index reaches {len(reachable)} blocks and holds {len(indexed)}")
