"""IndexFollower: what an index elsewhere holds, kept up to date by its events. Knows paths and media, no blocks.

Its life: rebuilt from a snapshot -> applies events in order, ignores repeats -> at a gap raises MissedEvents and stays
as it is -> rebuilt from a new snapshot.
"""

from collections.abc import Iterator

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.errors import MissedEvents
from memserve.kvcache.events import EventKind, IndexEvent, IndexSnapshot
from memserve.kvcache.radix_tree import RadixTree


class IndexFollower:
    """The paths of an index of `block_size` tokens a block, and the medium that each block lies in.

    Its tree keeps a medium where the index has a block. seq: the last event that it has applied.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tree = RadixTree(block_size)
        self._num_blocks = dict.fromkeys(Medium, 0)
        self.seq = 0

    def rebuild(self, snapshot: IndexSnapshot) -> None:
        """Forgets everything and starts anew from a snapshot."""
        self._clear()
        for event in snapshot.events:
            self._insert(event)
        self.seq = snapshot.seq

    def apply(self, event: IndexEvent) -> None:
        """Takes one event; one that was applied before changes nothing. Raises MissedEvents, with nothing changed."""
        if event.seq <= self.seq:
            return
        if event.seq > self.seq + 1:
            raise MissedEvents(f"event {event.seq} came after event {self.seq}")
        if event.kind is EventKind.INSERTED:
            self._insert(event)
        elif event.kind is EventKind.REMOVED:
            self._remove(event)
        elif event.kind is EventKind.MOVED:
            self._move(event)
        else:
            self._clear()
        self.seq = event.seq

    def cached_length(self, tokens: np.ndarray) -> int:
        """How many of `tokens` (C-contiguous int32 [n]) the index has, from the first on, in any medium."""
        walk = self._tree.walk(tokens, len(tokens) - len(tokens) % self._block_size)
        return walk.num_tokens + walk.shared

    def num_blocks(self, medium: Medium) -> int:
        """Blocks of the index that lie in a medium."""
        return self._num_blocks[medium]

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every maximal cached path: (tokens int32 [n * block_size], medium of each block int [n])."""
        return self._tree.iter_prefixes()

    def _clear(self) -> None:
        self._tree = RadixTree(self._block_size)
        self._num_blocks = dict.fromkeys(Medium, 0)

    def _insert(self, event: IndexEvent) -> None:
        """A snapshot names what two paths share twice; the second time it is there."""
        tree, path = self._tree, event.tokens
        nodes, num_tokens, inside, shared = tree.walk(path, len(path))
        if num_tokens + shared == len(path):
            return
        if inside is not None:
            nodes.append(tree.split(inside, shared))
            num_tokens += shared
        media = np.full(event.end_block - num_tokens // self._block_size, event.medium, np.int8)
        tree.grow(nodes[-1] if nodes else tree.root, path[num_tokens:].copy(), media, 0)
        self._num_blocks[event.medium] += len(media)

    def _remove(self, event: IndexEvent) -> None:
        """The nodes here may be cut elsewhere than the index's."""
        nodes = self._tree.walk(event.tokens, len(event.tokens)).nodes
        missing = event.end_block - event.first_block
        self._num_blocks[event.medium] -= missing
        while missing:
            leaf = nodes.pop()
            cut = min(missing, len(leaf.blocks))
            self._tree.trim(leaf, cut)
            missing -= cut
            if not len(leaf.blocks):
                self._tree.remove(leaf)

    def _move(self, event: IndexEvent) -> None:
        walk = self._tree.walk(event.tokens, len(event.tokens))
        for node in [*walk.nodes, *([walk.inside] if walk.inside is not None else [])]:
            before = node.num_tokens_before // self._block_size
            moved = node.blocks[max(event.first_block - before, 0) : max(event.end_block - before, 0)]
            for medium, count in zip(*np.unique(moved, return_counts=True), strict=True):
                self._num_blocks[Medium(medium)] -= int(count)
            self._num_blocks[event.medium] += len(moved)
            moved[:] = event.medium
