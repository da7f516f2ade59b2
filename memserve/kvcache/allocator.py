"""Allocator: fixed-size blocks with named holders. Knows numbers only; never sees a tensor or a token.

A block's life: free -> alloc(holder) -> retain / release by any number of holders -> free again when the last one lets
go, its generation one higher. The ledger says who holds what, so "who keeps this block alive" always has an answer.
The index is the one holder of many scattered blocks: it is kept as a bitmap, every other holder as a list.
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

    `refcounts` (int32 [num_blocks]) is readable by anyone and written here alone.
    """

    def __init__(self, num_blocks: int) -> None:
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_blocks={num_blocks}: expected 1 to {MAX_BLOCKS}")
        self.num_blocks = num_blocks
        self.refcounts = np.zeros(num_blocks, dtype=np.int32)
        self.generations = np.zeros(num_blocks, dtype=np.int32)
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # top of the stack is its end
        self._num_free = num_blocks
        self._indexed = np.zeros(num_blocks, dtype=bool)
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
        self.refcounts[blocks] = 1
        self._note(blocks, holder)
        return blocks

    def retain(self, blocks: np.ndarray, holder: Holder) -> None:
        """One more holder of blocks that are in use. Raises NotHeld if any of them is free."""
        if not len(blocks):
            return
        counts = self.refcounts[blocks]
        if not counts.all():
            raise NotHeld(f"{holder} retains free blocks {blocks[counts == 0].tolist()}")
        self._num_index_only -= int(np.count_nonzero(self._indexed[blocks] & (counts == 1)))
        self.refcounts[blocks] = counts + 1
        self._note(blocks, holder)

    def release(self, blocks: np.ndarray, holder: Holder) -> None:
        """Gives up `holder`'s hold. Raises NotHeld, with nothing released, unless it holds every one of them once."""
        if not len(blocks):
            return
        self._strike(blocks, holder)
        self._drop(blocks)

    def release_all(self, holder: Holder) -> int:
        """Gives up everything `holder` holds; returns how many blocks that was. The fast path of a request's end."""
        if holder == INDEX:
            blocks = np.flatnonzero(self._indexed).astype(np.int32)
            self.release(blocks, INDEX)
            return len(blocks)
        held = self._ledger.pop(holder, None)
        if held is None:
            return 0
        self._drop(held.view)
        return len(held)

    def held_by(self, holder: Holder) -> np.ndarray:
        """int32 [n]: the blocks that `holder` holds, in the order in which it took them."""
        if holder == INDEX:
            return np.flatnonzero(self._indexed).astype(np.int32)
        held = self._ledger.get(holder)
        return _EMPTY if held is None else held.view.copy()

    def holders(self) -> Iterator[Holder]:
        """Everyone who holds a block."""
        if self._indexed.any():
            yield INDEX
        yield from self._ledger

    def holders_of(self, block: int) -> list[Holder]:
        """Everyone who holds this block."""
        return [h for h in self.holders() if block in self.held_by(h)]

    def _note(self, blocks: np.ndarray, holder: Holder) -> None:
        """Enters blocks that already count `holder` into the ledger."""
        if holder == INDEX:
            self._indexed[blocks] = True
            self._num_index_only += int(np.count_nonzero(self.refcounts[blocks] == 1))
        elif holder in self._ledger:
            self._ledger[holder].extend(blocks)
        elif len(blocks):
            self._ledger[holder] = IntBuffer(blocks)

    def _strike(self, blocks: np.ndarray, holder: Holder) -> None:
        """Removes blocks from the ledger's entry, all or none."""
        if (blocks < 0).any() or (blocks >= self.num_blocks).any() or len(np.unique(blocks)) != len(blocks):
            raise NotHeld(f"{holder} releases {blocks.tolist()}: numbers outside [0, {self.num_blocks}) or repeated")
        if holder == INDEX:
            if not self._indexed[blocks].all():
                raise NotHeld(f"{holder} does not hold {blocks[~self._indexed[blocks]].tolist()}")
            self._num_index_only -= int(np.count_nonzero(self.refcounts[blocks] == 1))
            self._indexed[blocks] = False
            return
        held = self.held_by(holder)
        missing = blocks[~np.isin(blocks, held)]
        if len(missing):
            raise NotHeld(f"{holder} does not hold {missing.tolist()}")
        kept = held[~np.isin(held, blocks)]
        if len(kept):
            self._ledger[holder] = IntBuffer(kept)
        else:
            del self._ledger[holder]

    def _drop(self, blocks: np.ndarray) -> None:
        """Counts one holder less; frees the blocks that have none left."""
        counts = self.refcounts[blocks] - 1
        self.refcounts[blocks] = counts
        self._num_index_only += int(np.count_nonzero(self._indexed[blocks] & (counts == 1)))
        freed = blocks[counts == 0]
        self.generations[freed] += 1
        end = self._num_free + len(freed)
        self._stack[self._num_free : end] = freed[::-1]
        self._num_free = end

    def check(self) -> None:
        """Recomputes everything from the ledger. Raises BrokenInvariant at the first difference."""
        counts = self._indexed.astype(np.int32)
        for holder, held in self._ledger.items():
            if len(np.unique(held.view)) != len(held) or not len(held):
                raise BrokenInvariant(f"{holder} holds a block twice, or nothing: {held.view.tolist()}")
            counts[held.view] += 1
        if (counts != self.refcounts).any():
            raise BrokenInvariant(
                f"reference counts differ from the ledger at {np.flatnonzero(counts != self.refcounts)}"
            )
        free = self._stack[: self._num_free]
        if len(np.unique(free)) != len(free) or self.refcounts[free].any():
            raise BrokenInvariant("the free stack repeats a block or holds one in use")
        if self._num_free + np.count_nonzero(self.refcounts) != self.num_blocks:
            raise BrokenInvariant("blocks are neither free nor in use")
        if self._num_index_only != np.count_nonzero(self._indexed & (self.refcounts == 1)):
            raise BrokenInvariant("the count of blocks held by the index alone drifted")
