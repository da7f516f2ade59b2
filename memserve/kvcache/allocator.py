"""Allocator: fixed-size blocks with named holders. Knows numbers only; never sees a tensor or a token.

A block's life: free -> alloc(holder) -> retain / release by any number of holders -> free again when the last one lets
go, its generation one higher. The ledger says who holds what, so "who keeps this block alive" always has an answer.
The index is the one holder of many scattered blocks: it is kept as a bit of the count, every other holder as a list.
"""

from collections.abc import Iterator

import numpy as np

from memserve.kvcache.address import MAX_BLOCKS
from memserve.kvcache.errors import BrokenInvariant, NotHeld, OutOfBlocks
from memserve.request import IntBuffer

Holder = tuple[str | int, ...]
INDEX: Holder = ("index",)

_EMPTY = np.empty(0, dtype=np.int32)


class Allocator:
    """`num_blocks` blocks, numbered from 0. All block arguments and results are int32 arrays without repeats.

    refcounts: int32 [num_blocks], read by indexes and written here alone: 2 for each holder, but 1 for the index. So 0
    is free, 1 is held by the index alone (evictable), and above 1 somebody uses the block.
    """

    def __init__(self, num_blocks: int) -> None:
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_blocks={num_blocks}: expected 1 to {MAX_BLOCKS}")
        self.num_blocks = num_blocks
        self.refcounts = np.zeros(num_blocks, dtype=np.int32)
        self.generations = np.zeros(num_blocks, dtype=np.int32)
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # top of the stack is its end
        self._num_free = num_blocks
        self._num_index_only = 0
        self._ledger: dict[Holder, IntBuffer] = {}

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_index_only(self) -> int:
        """Blocks that nobody but the index holds: what eviction can free."""
        return self._num_index_only

    def alloc(self, num_blocks: int, holder: Holder) -> np.ndarray:
        """Exactly `num_blocks` blocks, held by `holder`; neighbours where the free stack has them.

        Raises OutOfBlocks, with nothing allocated.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks}: expected an integer >= 0")
        if num_blocks > self._num_free:
            raise OutOfBlocks(f"{num_blocks} blocks asked for, {self._num_free} of {self.num_blocks} free")
        start = self._num_free - num_blocks
        blocks = self._stack[start : self._num_free][::-1].copy()
        self._num_free = start
        self.refcounts[blocks] = _weight(holder)
        if holder == INDEX:
            self._num_index_only += num_blocks
        else:
            self._note(blocks, holder)
        return blocks

    def retain(self, blocks: np.ndarray, holder: Holder) -> None:
        """One more holder of blocks that are in use. Raises NotHeld if any is free, or the index has it already."""
        if not len(blocks):
            return
        counts = self.refcounts[blocks]
        if not counts.all():
            raise NotHeld(f"{holder} retains free blocks {blocks[counts == 0].tolist()}")
        if holder == INDEX:
            if (counts & 1).any():
                raise NotHeld(f"{holder} retains blocks {blocks[(counts & 1) == 1].tolist()} a second time")
        else:
            self._num_index_only -= int(np.count_nonzero(counts == 1))
            self._note(blocks, holder)
        self.refcounts[blocks] = counts + _weight(holder)

    def release(self, blocks: np.ndarray, holder: Holder) -> None:
        """Gives up `holder`'s hold. Raises NotHeld, with nothing released, unless it holds every one of them once."""
        if not len(blocks):
            return
        in_range = (blocks >= 0) & (blocks < self.num_blocks)
        if not in_range.all() or len(np.unique(blocks)) != len(blocks):
            raise NotHeld(f"{holder} releases {blocks.tolist()}: numbers outside [0, {self.num_blocks}) or repeated")
        if holder == INDEX:
            counts = self.refcounts[blocks]
            if not (counts & 1).all():
                raise NotHeld(f"{holder} does not hold {blocks[(counts & 1) == 0].tolist()}")
            self._num_index_only -= int(np.count_nonzero(counts == 1))
        else:
            self._strike(blocks, holder)
        self._drop(blocks, _weight(holder))

    def release_all(self, holder: Holder) -> int:
        """Gives up everything `holder` holds; returns how many blocks that was. The fast path of a request's end."""
        if holder == INDEX:
            blocks = self.held_by(INDEX)
            self.release(blocks, INDEX)
            return len(blocks)
        held = self._ledger.pop(holder, None)
        if held is None:
            return 0
        self._drop(held.view, _weight(holder))
        return len(held)

    def held_by(self, holder: Holder) -> np.ndarray:
        """int32 [n]: the blocks that `holder` holds, in the order in which it took them."""
        if holder == INDEX:
            return np.flatnonzero(self.refcounts & 1).astype(np.int32)
        held = self._ledger.get(holder)
        return _EMPTY if held is None else held.view.copy()

    def holders(self) -> Iterator[Holder]:
        """Everyone who holds a block."""
        if (self.refcounts & 1).any():
            yield INDEX
        yield from self._ledger

    def holders_of(self, block: int) -> list[Holder]:
        """Everyone who holds this block."""
        return [h for h in self.holders() if block in self.held_by(h)]

    def _note(self, blocks: np.ndarray, holder: Holder) -> None:
        """Enters blocks into the ledger."""
        if holder in self._ledger:
            self._ledger[holder].extend(blocks)
        elif len(blocks):
            self._ledger[holder] = IntBuffer(blocks)

    def _strike(self, blocks: np.ndarray, holder: Holder) -> None:
        """Removes blocks from the ledger's entry, all or none."""
        held = self.held_by(holder)
        missing = blocks[~np.isin(blocks, held)]
        if len(missing):
            raise NotHeld(f"{holder} does not hold {missing.tolist()}")
        kept = held[~np.isin(held, blocks)]
        if len(kept):
            self._ledger[holder] = IntBuffer(kept)
        else:
            del self._ledger[holder]

    def _drop(self, blocks: np.ndarray, weight: int) -> None:
        """Counts one holder less; frees the blocks that have none left."""
        counts = self.refcounts[blocks] - weight
        self.refcounts[blocks] = counts
        in_use = np.count_nonzero(counts)
        if in_use:
            self._num_index_only += int(np.count_nonzero(counts == 1)) if weight > 1 else 0
            blocks = blocks[counts == 0]
        self.generations[blocks] += 1
        end = self._num_free + len(blocks)
        self._stack[self._num_free : end] = blocks[::-1]
        self._num_free = end

    def check(self) -> None:
        """Recomputes everything from the ledger. Raises BrokenInvariant at the first difference."""
        counts = self.refcounts & 1
        for holder, held in self._ledger.items():
            if len(np.unique(held.view)) != len(held) or not len(held):
                raise BrokenInvariant(f"{holder} holds a block twice, or nothing: {held.view.tolist()}")
            counts[held.view] += _weight(holder)
        wrong = np.flatnonzero(counts != self.refcounts)
        if len(wrong):
            raise BrokenInvariant(f"reference counts differ from the ledger at blocks {wrong.tolist()}")
        free = self._stack[: self._num_free]
        if len(np.unique(free)) != len(free) or self.refcounts[free].any():
            raise BrokenInvariant("the free stack repeats a block or holds one in use")
        if self._num_free + np.count_nonzero(self.refcounts) != self.num_blocks:
            raise BrokenInvariant("blocks are neither free nor in use")
        if self._num_index_only != np.count_nonzero(self.refcounts == 1):
            raise BrokenInvariant("the count of blocks held by the index alone drifted")


def _weight(holder: Holder) -> int:
    return 1 if holder == INDEX else 2
