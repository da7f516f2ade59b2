"""Swaps: blocks on their way between the media. Knows block numbers, who holds them, and the index; not why they go.

    begin: new blocks in the other medium; these and the old ones are held by ("swap", n)
    end:   the index, and the holder for whom they move, have the new ones; the old ones are given up

Until a swap has ended everybody goes on with the old blocks. When it ends, what has become of them meanwhile decides:
whatever nobody wants any more is dropped, at both ends. One whose copy fails ends too: everything stays at its old
place, the new blocks are free again, and whoever noticed its end gets what the copy raised.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.allocator import INDEX, Allocator, Holder
from memserve.kvcache.copy_engine import NOTHING_TO_WAIT_FOR, Copy, CopyEngine
from memserve.kvcache.index import Index
from memserve.request import IntBuffer


@dataclass(eq=False)
class Swap:
    """sources, targets: int32 [n].  holder: for whom they move; the index alone if it is INDEX.

    moved: bool [n], once it has ended: which blocks `holder` has at the new place.  failed: what its copy raised, in
    words, or "".  then: called at its end.
    """

    name: Holder
    sources: np.ndarray
    targets: np.ndarray
    holder: Holder
    copy: Copy
    has_ended: bool = False
    moved: np.ndarray = field(init=False)
    failed: str = ""
    then: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.moved = np.zeros(len(self.sources), dtype=bool)

    @property
    def arrived(self) -> np.ndarray:
        """Where the blocks that moved lie now, int32 [at most n]."""
        arrived: np.ndarray = self.targets[self.moved]
        return arrived

    def replaced(self, blocks: np.ndarray) -> np.ndarray:
        """`blocks`, int32 [m], with those that moved where they lie now."""
        new_place = dict(zip(self.sources[self.moved].tolist(), self.arrived.tolist(), strict=True))
        return np.array([new_place.get(block, block) for block in blocks.tolist()], dtype=np.int32)

    def replace_in(self, table: IntBuffer) -> None:
        """The same in a request's block table."""
        if len(self.sources):
            blocks = self.replaced(table.view)
            table.truncate(0)
            table.extend(blocks)


class Swaps:
    """The swaps of one pool. num_out, num_in: blocks moved down and up since it was made.  num_waited: of these, those
    for whose copies somebody waited.

    followers: called with (old, new), int32 [n] each, when the index has taken a copy for blocks that others use.
    """

    def __init__(self, allocator: Allocator, index: Index, engine: CopyEngine) -> None:
        self._allocator, self._index, self._engine = allocator, index, engine
        self._num_begun = 0
        self.open: list[Swap] = []
        self.num_out = 0
        self.num_in = 0
        self.num_waited = 0
        self.followers: list[Callable[[np.ndarray, np.ndarray], None]] = []

    @property
    def waited_ns(self) -> int:
        """See CopyEngine."""
        return self._engine.waited_ns

    @property
    def next_time_ns(self) -> int | None:
        """When the first ends, if anything is known of that."""
        return min((m.copy.due_ns for m in self.open if m.copy.due_ns is not None), default=None)

    def begin(self, sources: np.ndarray, medium: Medium, holder: Holder, now_ns: int) -> Swap:
        """Moves blocks of one medium to free ones of the other. Raises OutOfBlocks, or what the engine or a copy that
        is done at once raises, with nothing moved and nothing held.
        """
        if not len(sources):
            return Swap(INDEX, sources, sources, holder, NOTHING_TO_WAIT_FOR, has_ended=True)
        name: Holder = ("swap", self._num_begun)
        targets = self._allocator.alloc(len(sources), name, medium)
        self._allocator.retain(sources, name)
        self._num_begun += 1
        try:
            copy = self._engine.start(sources, targets, now_ns)
        except Exception:
            self._allocator.release_all(name)
            raise
        swap = Swap(name, sources, targets, holder, copy)
        self.open.append(swap)
        if copy.has_ended(now_ns):
            self.end(swap)
        return swap

    def end_due(self, now_ns: int) -> None:
        """Ends what has been copied."""
        for swap in [swap for swap in self.open if swap.copy.has_ended(now_ns)]:
            self._end(swap)

    def end_all(self, which: Callable[[Swap], bool] = lambda swap: True) -> bool:
        """Waits for the open swaps that `which` picks; whether there were any."""
        picked = [swap for swap in self.open if which(swap)]
        for swap in picked:
            self.end(swap)
        return bool(picked)

    def end(self, swap: Swap) -> None:
        """Waits for a swap's copy, if it has not ended; whoever wants the blocks has the new ones then.

        Raises what the copy failed with, once nothing is held for it any more.
        """
        if not swap.has_ended:
            self.num_waited += self._end(swap)

    def _end(self, swap: Swap) -> int:
        """Returns how many blocks have moved."""
        try:
            swap.copy.finish()
        except Exception as error:
            swap.failed = f"the copy failed: {error!r}"
            self._close(swap)
            raise
        num_moved = self._hand_over(swap)
        self._close(swap)
        return num_moved

    def _hand_over(self, swap: Swap) -> int:
        """Whoever wants the blocks gets the new ones for the old ones. Returns how many these are."""
        a, counts = self._allocator, self._allocator.refcounts[swap.sources]
        cached = (counts & 1) == 1
        if swap.holder == INDEX:
            swap.moved = cached = counts == 3  # the index and this swap: whoever came to use it meanwhile stays there
        else:
            swap.moved = np.isin(swap.sources, a.held_by(swap.holder))
        self.displace(swap.sources[cached], swap.targets[cached], 2 + 2 * swap.moved[cached])
        if swap.holder != INDEX:
            a.retain(swap.arrived, swap.holder)
            a.release(swap.sources[swap.moved], swap.holder)
        num_kept = int(np.count_nonzero(cached | swap.moved))
        if swap.targets[0] >= a.num_blocks:
            self.num_out += num_kept
        else:
            self.num_in += num_kept
        return num_kept

    def displace(self, old: np.ndarray, new: np.ndarray, num_ours: np.ndarray | int = 0) -> None:
        """The index has blocks `new` in the place of `old`. num_ours: what counts of these are the mover's."""
        used = self._allocator.refcounts[old] > 1 + num_ours
        self._allocator.offered_to[new] = self._allocator.offered_to[old]
        self._index.repoint(old, new)
        self._allocator.retain(new, INDEX)
        for follower in self.followers if used.any() else ():
            follower(old[used], new[used])
        self._allocator.release(old, INDEX)

    def _close(self, swap: Swap) -> None:
        """Nothing is held for the swap any more, and who waits for its end is told."""
        self._allocator.release_all(swap.name)
        self.open.remove(swap)
        swap.has_ended = True
        if swap.then is not None:
            swap.then()
