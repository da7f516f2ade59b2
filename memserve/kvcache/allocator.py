"""Allocator: fixed-size blocks with named holders. Knows numbers only; never sees a tensor or a token.

    # block numbers: [0, num_blocks) lie in HBM | [num_blocks, num_blocks + num_dram_blocks) lie in DRAM

A block's life: free -> alloc(holder) -> retain / release by any number of holders -> free again when the last one lets
go, its generation one higher. The ledger says who holds what, so "who keeps this block alive" always has an answer.
The index is the one holder of many scattered blocks: it is kept as a bit of the count, every other holder as a list.
Arrays are read and written at `_places(blocks)`: NumPy does so four times faster at indices of its own integer type.
"""

from collections.abc import Iterator, KeysView

import numpy as np

from memserve.kvcache.address import MAX_BLOCKS, Medium
from memserve.kvcache.errors import BrokenInvariant, NotHeld, OutOfBlocks
from memserve.request import IntBuffer

Holder = tuple[str | int, ...]
INDEX: Holder = ("index",)
NOBODY = -1  # in offered_to

_EMPTY = np.empty(0, dtype=np.int32)


class _FreeStack:
    """The free blocks of one medium; the last one pushed is the first one popped."""

    def __init__(self, first: int, count: int) -> None:
        self._stack = np.arange(first + count - 1, first - 1, -1, dtype=np.int32)  # its top is its end
        self.size = count

    @property
    def view(self) -> np.ndarray:
        return self._stack[: self.size]

    def pop(self, count: int) -> np.ndarray:
        self.size -= count
        return self._stack[self.size : self.size + count][::-1].copy()

    def push(self, blocks: np.ndarray) -> None:
        end = self.size + len(blocks)
        self._stack[self.size : end] = blocks[::-1]
        self.size = end


class Allocator:
    """`num_blocks` blocks in HBM and `num_dram_blocks` in DRAM. Block arrays are int32, without repeats.

    refcounts: int32 [all blocks], read by indexes and written here alone: 2 for each holder, but 1 for the index. So 0
    is free, 1 is held by the index alone (evictable), and above 1 somebody uses the block.
    offered_to: int16 [all blocks], written by who gives cached KV away: to which instance it was offered, since it is
    cached here; NOBODY where to none.
    num_evicted_unoffered: blocks that were evicted without having been.
    """

    def __init__(self, num_blocks: int, num_dram_blocks: int = 0) -> None:
        if not 0 <= num_dram_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_dram_blocks={num_dram_blocks}: expected 0 to {MAX_BLOCKS}")
        least = 0 if num_dram_blocks else 1  # who computes nothing needs no HBM
        if not least <= num_blocks <= MAX_BLOCKS:
            raise ValueError(f"num_blocks={num_blocks}: expected {least} to {MAX_BLOCKS}")
        self.num_blocks = num_blocks
        self.num_dram_blocks = num_dram_blocks
        self.refcounts = np.zeros(num_blocks + num_dram_blocks, dtype=np.int32)
        self.generations = np.zeros(num_blocks + num_dram_blocks, dtype=np.int64)
        self.offered_to = np.full(num_blocks + num_dram_blocks, NOBODY, dtype=np.int16)
        self.num_evicted_unoffered = 0
        self._free = {
            Medium.HBM: _FreeStack(0, num_blocks),
            Medium.DRAM: _FreeStack(num_blocks, num_dram_blocks),
        }
        self._num_index_only = {Medium.HBM: 0, Medium.DRAM: 0}
        self._ledger: dict[Holder, IntBuffer] = {}
        self._order = np.zeros(num_blocks + num_dram_blocks, dtype=np.int32)  # scratch: never cleared, always verified

    @property
    def num_free(self) -> int:
        """Free blocks in HBM."""
        return self._free[Medium.HBM].size

    @property
    def num_free_dram(self) -> int:
        return self._free[Medium.DRAM].size

    @property
    def num_index_only(self) -> int:
        """Blocks in HBM that nobody but the index holds: what eviction, or a move to DRAM, can free."""
        return self._num_index_only[Medium.HBM]

    @property
    def num_index_only_dram(self) -> int:
        return self._num_index_only[Medium.DRAM]

    def alloc(self, num_blocks: int, holder: Holder, medium: Medium = Medium.HBM) -> np.ndarray:
        """Exactly `num_blocks` blocks of a medium, held by `holder`; neighbours where the free stack has them.

        Raises OutOfBlocks, with nothing allocated.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks}: expected an integer >= 0")
        free = self._free[medium]
        if num_blocks > free.size:
            capacity = self.num_dram_blocks if medium else self.num_blocks
            raise OutOfBlocks(f"{num_blocks} blocks asked for, {free.size} of {capacity} free in {medium.name}")
        blocks = free.pop(num_blocks)
        places = _places(blocks)
        self.refcounts[places], self.offered_to[places] = _weight(holder), NOBODY
        if holder == INDEX:
            self._num_index_only[medium] += num_blocks
        else:
            self._note(blocks, holder)
        return blocks

    def retain(self, blocks: np.ndarray, holder: Holder) -> None:
        """One more holder of blocks that are in use. Raises NotHeld if any is free, or the index has it already."""
        if not len(blocks):
            return
        places = _places(blocks)
        counts = self.refcounts[places]
        if np.count_nonzero(counts) < len(counts):
            raise NotHeld(f"{holder} retains free blocks {blocks[counts == 0].tolist()}")
        if holder == INDEX:
            if np.count_nonzero(counts & 1):
                raise NotHeld(f"{holder} retains blocks {blocks[(counts & 1) == 1].tolist()} a second time")
        else:
            self._tally(blocks, counts == 1, -1)
            self._note(blocks, holder)
        self.refcounts[places] = counts + _weight(holder)

    def release(self, blocks: np.ndarray, holder: Holder) -> None:
        """Gives up `holder`'s hold. Raises NotHeld, with nothing released, unless it holds every one of them once."""
        if not len(blocks):
            return
        held = self._ledger.get(holder)
        if held is not None and len(held) == len(blocks) and held.view.tobytes() == blocks.tobytes():
            self.release_all(holder)
            return
        places, end = _places(blocks), len(self.refcounts)
        outside = places.view(np.uintp) >= end  # a negative number is a large one there
        if np.count_nonzero(outside) or self._repeats(places):
            raise NotHeld(f"{holder} releases {blocks.tolist()}: numbers outside [0, {end}) or repeated")
        if holder == INDEX:
            counts = self.refcounts[places]
            if np.count_nonzero(counts & 1) < len(counts):
                raise NotHeld(f"{holder} does not hold {blocks[(counts & 1) == 0].tolist()}")
            self._tally(blocks, counts == 1, -1)
        else:
            self._strike(blocks, holder)
        self._drop(blocks, _weight(holder))

    def evicted(self, blocks: np.ndarray) -> None:
        """Frees blocks that the index let go of by its own choice, each of which it alone held."""
        if not len(blocks):
            return
        places = _places(blocks)
        assert np.count_nonzero(self.refcounts[places] == 1) == len(blocks), "the index evicts what others hold"
        self.refcounts[places] = 0
        self.num_evicted_unoffered += len(blocks) - int(np.count_nonzero(self.offered_to[places] != NOBODY))
        in_dram = self._free_places(blocks, places)
        self._num_index_only[Medium.DRAM] -= in_dram
        self._num_index_only[Medium.HBM] -= len(blocks) - in_dram

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

    def rename(self, holder: Holder, new_name: Holder) -> Holder:
        """What `holder` holds is held under a new name from now on, which it returns. Neither is the index's."""
        assert new_name not in self._ledger and INDEX not in (holder, new_name)
        if holder in self._ledger:
            self._ledger[new_name] = self._ledger.pop(holder)
        return new_name

    def held_by(self, holder: Holder) -> np.ndarray:
        """int32 [n]: the blocks that `holder` holds, in the order in which it took them."""
        if holder == INDEX:
            return np.flatnonzero(self.refcounts & 1).astype(np.int32)
        held = self._ledger.get(holder)
        return _EMPTY if held is None else held.view.copy()

    def find(self, blocks: np.ndarray, holder: Holder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `holder`, not the index, has; where in that each of `blocks` stands; whether it does, bool [n]."""
        held = self._ledger[holder].view if holder in self._ledger else _EMPTY
        self._order[_places(held)] = np.arange(len(held), dtype=np.int32)
        order = self._order[_places(blocks)]  # of blocks that are not held: whatever was left there
        found = order < len(held)
        found[found] = held[order[found]] == blocks[found]
        return held, order, found

    def holders(self) -> Iterator[Holder]:
        """Everyone who holds a block."""
        if (self.refcounts & 1).any():
            yield INDEX
        yield from self._ledger

    def named_holders(self) -> KeysView[Holder]:
        """Everyone but the index who holds a block, without a look at the blocks."""
        return self._ledger.keys()

    def holders_of(self, block: int) -> list[Holder]:
        """Everyone who holds this block."""
        return [h for h in self.holders() if block in self.held_by(h)]

    def _note(self, blocks: np.ndarray, holder: Holder) -> None:
        """Enters blocks into the ledger."""
        if holder in self._ledger:
            self._ledger[holder].extend(blocks)
        elif len(blocks):
            self._ledger[holder] = IntBuffer(blocks)

    def _repeats(self, places: np.ndarray) -> bool:
        """Whether a block stands there twice: then only the last is read back."""
        order = np.arange(len(places), dtype=np.int32)
        self._order[places] = order
        return bool(self._order[places].tobytes() != order.tobytes())

    def _strike(self, blocks: np.ndarray, holder: Holder) -> None:
        """Removes blocks from the ledger's entry, all or none."""
        held, order, found = self.find(blocks, holder)
        if not found.all():
            raise NotHeld(f"{holder} does not hold {blocks[~found].tolist()}")
        stays = np.ones(len(held), dtype=bool)
        stays[order] = False
        kept = held[stays]
        if len(kept):
            self._ledger[holder] = IntBuffer(kept)
        else:
            del self._ledger[holder]

    def _drop(self, blocks: np.ndarray, weight: int) -> None:
        """Counts one holder less; frees the blocks that have none left."""
        places = _places(blocks)
        counts = self.refcounts[places] - weight
        self.refcounts[places] = counts
        num_in_use = np.count_nonzero(counts)
        if num_in_use:
            self._tally(blocks, counts == 1, +1)
        if num_in_use < len(blocks):
            gone = counts == 0
            self._free_places(blocks[gone], places[gone])

    def _free_places(self, blocks: np.ndarray, places: np.ndarray) -> int:
        """Puts blocks without a holder back, their addresses stale from now on; returns how many lie in DRAM."""
        self.generations[places] += 1
        if not self.num_dram_blocks:
            self._free[Medium.HBM].push(blocks)
            return 0
        in_dram = blocks >= self.num_blocks
        gone = blocks[in_dram]
        self._free[Medium.DRAM].push(gone)
        self._free[Medium.HBM].push(blocks[~in_dram])
        return len(gone)

    def _tally(self, blocks: np.ndarray, index_only: np.ndarray, sign: int) -> None:
        """Counts blocks (bool [n] says which of them) that begin or cease to be held by the index alone."""
        num_dram = 0
        if self.num_dram_blocks:
            num_dram = int(np.count_nonzero(index_only & (blocks >= self.num_blocks)))
            self._num_index_only[Medium.DRAM] += sign * num_dram
        self._num_index_only[Medium.HBM] += sign * (int(np.count_nonzero(index_only)) - num_dram)

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
        free = np.concatenate([stack.view for stack in self._free.values()])
        if len(np.unique(free)) != len(free) or self.refcounts[free].any():
            raise BrokenInvariant("the free stacks repeat a block or hold one in use")
        if (self._free[Medium.HBM].view >= self.num_blocks).any() or (free[self.num_free :] < self.num_blocks).any():
            raise BrokenInvariant("a block is free in the other medium")
        if len(free) + np.count_nonzero(self.refcounts) != len(self.refcounts):
            raise BrokenInvariant("blocks are neither free nor in use")
        index_only = np.flatnonzero(self.refcounts == 1)
        num_hbm = int(np.count_nonzero(index_only < self.num_blocks))
        if list(self._num_index_only.values()) != [num_hbm, len(index_only) - num_hbm]:
            raise BrokenInvariant("the count of blocks held by the index alone drifted")


def _weight(holder: Holder) -> int:
    return 1 if holder == INDEX else 2


def _places(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.intp)
