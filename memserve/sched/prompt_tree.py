"""Prompt trees: what the global scheduler believes each instance of a role has cached (section 6). Knows no policy.

Where the belief comes from is a word, `index_source`:

    none         nothing is believed: every instance looks empty
    optimistic   answers that pass by say what was computed where; forgotten after a time to live, or for space
    exact        every instance's index reports what enters and leaves it (kvcache/events.py)
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from memserve.clock import LONGEST_S, to_ns
from memserve.kvcache.errors import MissedEvents
from memserve.kvcache.events import EventKind, IndexEvent, IndexSnapshot
from memserve.sched.shared_tree import HolderNode, SharedTree
from memserve.values import require_int, require_number

MANY_BLOCKS = 65536  # a million tokens at 16 a block
_NEVER = 1 << 63


class PromptIndex(ABC):
    """The belief about `num_rows` instances. Prompts are int32 bytes; only whole blocks of them count.

    num_evicted_blocks: forgotten for want of space.  num_expired_blocks: because nobody had used them for long.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self.num_evicted_blocks = self.num_expired_blocks = 0
        self._tree = SharedTree(num_rows, block_size)

    def add_row(self) -> None:
        """One more instance, the last row, of which nothing is believed yet."""
        self._tree.add_row()

    def match(self, tokens: bytes, now_ns: int) -> np.ndarray:
        """How many of the tokens each instance has, from the first on: int64 [num_rows]."""
        return self._tree.match(tokens)

    @abstractmethod
    def learn(self, row: int, tokens: bytes, now_ns: int) -> None:
        """An answer that passes by says that an instance has the KV of these tokens."""

    def purge(self, row: int) -> None:
        """An instance is gone, and what it had with it."""
        self._tree.purge(row)

    @property
    def num_blocks(self) -> int:
        """Blocks believed to be cached, counted once for each instance that has them."""
        return sum(self._tree.num_blocks)

    def check(self) -> None:
        """Raises AssertionError unless the tree's books agree."""
        self._tree.check()

    def _whole_blocks(self, tokens: bytes) -> bytes:
        return tokens[: len(tokens) - len(tokens) % self._tree.block_bytes]


class NoPromptTree(PromptIndex):
    """Believes nothing: the baseline."""

    def learn(self, row: int, tokens: bytes, now_ns: int) -> None:
        """Nothing is remembered."""


class Optimistic(PromptIndex):
    """Learns from answers, and is told of no eviction (section 6).

    ttl_s: what was not used for so long is taken for evicted; the paper says minutes.  max_blocks: most blocks
    remembered of an instance, the least recently used go first; with the size of its pool the tree evicts when the
    pool does, as far as both see the same order. Raises ValueError for values out of range.

    A (row, node) pair has an entry in the row's heap under the time at which it was first seen; a pair that was used
    since goes back under its new time when it comes up, so that using a prefix costs no heap operation. The entry goes
    with what is forgotten: one left behind would count again if the row came to hold the node once more.
    """

    def __init__(self, num_rows: int, block_size: int, ttl_s: float = 300.0, max_blocks: int = MANY_BLOCKS) -> None:
        allowed = f"a number of seconds in (0, {LONGEST_S:g}]"
        require_number("index_source.ttl_s", ttl_s, allowed, minimum=0.0, maximum=LONGEST_S, exclusive=True)
        require_int("index_source.max_blocks", max_blocks, 1)
        super().__init__(num_rows, block_size)
        self._ttl_ns, self._max_blocks = to_ns(ttl_s), max_blocks
        self._oldest: list[list[tuple[int, int, int, HolderNode]]] = [[] for _ in range(num_rows)]
        self._num_entries = 0
        self._first_ns = _NEVER  # nothing was seen before

    def add_row(self) -> None:
        super().add_row()
        self._oldest.append([])

    def match(self, tokens: bytes, now_ns: int) -> np.ndarray:
        self._expire(now_ns - self._ttl_ns)
        return super().match(tokens, now_ns)

    def learn(self, row: int, tokens: bytes, now_ns: int) -> None:
        """Notes or renews a prefix, then makes room for it. Time does not go back."""
        self._expire(now_ns - self._ttl_ns)
        grown = self._tree.hold(row, self._whole_blocks(tokens), now_ns)
        for head in grown.heads:
            self._enter_for_all(head)  # the row among them
        for node in grown.nodes:
            if node not in grown.heads:
                self._enter(row, node)
        while (surplus := self._tree.num_blocks[row] - self._max_blocks) > 0:
            self.num_evicted_blocks += self._forget_oldest(row, surplus)

    def purge(self, row: int) -> None:
        super().purge(row)
        self._oldest[row].clear()

    def check(self) -> None:
        super().check()
        for row, heap in enumerate(self._oldest):
            held = [node for *_, node in heap if row in node.seen]
            assert len(held) == len(set(held)), f"row {row} has two entries for a node"
            num_blocks = sum(len(node.edge) for node in held) // self._tree.block_bytes
            assert num_blocks == self._tree.num_blocks[row], f"row {row} has no entry for a node that it holds"

    def _expire(self, before_ns: int) -> None:
        if self._first_ns >= before_ns:
            return
        for row, heap in enumerate(self._oldest):
            while heap and heap[0][0] < before_ns:
                self._settle(row)
                if heap and heap[0][0] < before_ns:
                    self.num_expired_blocks += self._forget_oldest(row, self._max_blocks)
        self._first_ns = min((heap[0][0] for heap in self._oldest if heap), default=_NEVER)

    def _settle(self, row: int) -> None:
        """Brings the entry that is truly the oldest to the top of a row's heap."""
        heap = self._oldest[row]
        while heap:
            noted_ns, _, _, node = heap[0]
            if row not in node.seen:
                heapq.heappop(heap)
            elif node.seen[row] > noted_ns:
                heapq.heappop(heap)
                self._enter(row, node)
            else:
                return

    def _forget_oldest(self, row: int, at_most: int) -> int:
        """Forgets the least recently used blocks of a row, deepest first, at most so many; returns how many."""
        self._settle(row)
        _, _, _, node = heapq.heappop(self._oldest[row])
        num_blocks = len(node.edge) // self._tree.block_bytes
        if num_blocks > at_most:
            head = self._tree.split(node, len(node.edge) - at_most * self._tree.block_bytes)
            self._enter_for_all(head)
            num_blocks = at_most
        self._tree.drop(row, node)
        return num_blocks

    def _enter_for_all(self, node: HolderNode) -> None:
        for row in node.seen:
            self._enter(row, node)

    def _enter(self, row: int, node: HolderNode) -> None:
        """Of nodes seen at the same time the deepest is the oldest."""
        self._num_entries += 1
        self._first_ns = min(self._first_ns, node.seen[row])
        heapq.heappush(self._oldest[row], (node.seen[row], -node.end, self._num_entries, node))


class Exact(PromptIndex):
    """Follows the events of the instances' indexes. Bounded by their pools, and late by what a message takes.

    A block counts wherever it lies, in HBM or DRAM. An instance of which nothing is known yet, or of which an event was
    missed, is rebuilt from a snapshot.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        super().__init__(num_rows, block_size)
        self._seqs: list[int | None] = [0] * num_rows  # of the last event applied; None: only a snapshot helps

    def add_row(self) -> None:
        super().add_row()
        self._seqs.append(0)

    def learn(self, row: int, tokens: bytes, now_ns: int) -> None:
        """Events say it better."""

    def purge(self, row: int) -> None:
        super().purge(row)
        self._seqs[row] = None

    def apply(self, row: int, events: Sequence[IndexEvent]) -> None:
        """Takes an instance's events in their order; repeats change nothing. Raises MissedEvents at a gap."""
        for event in events:
            seq = self._seqs[row]
            if seq is None or event.seq > seq + 1:
                raise MissedEvents(f"event {event.seq} of row {row} came after {seq}")
            if event.seq == seq + 1:
                self._apply(row, event)
                self._seqs[row] = event.seq

    def rebuild(self, row: int, snapshot: IndexSnapshot) -> None:
        """Forgets what it knew of an instance and starts anew."""
        super().purge(row)
        for event in snapshot.events:
            self._tree.hold(row, event.path, 0)
        self._seqs[row] = snapshot.seq

    def _apply(self, row: int, event: IndexEvent) -> None:
        if event.kind is EventKind.INSERTED:
            self._tree.hold(row, event.path, 0)
        elif event.kind is EventKind.REMOVED:
            self._tree.cut(row, event.path, event.first_block * self._tree.block_bytes)
        elif event.kind is EventKind.CLEARED:
            super().purge(row)


def counts_of(trees: Sequence[PromptIndex]) -> dict[str, int]:
    """Blocks in some trees now, and those forgotten for space and for age."""
    return {
        "tree_blocks": sum(tree.num_blocks for tree in trees),
        "tree_evicted_blocks": sum(tree.num_evicted_blocks for tree in trees),
        "tree_expired_blocks": sum(tree.num_expired_blocks for tree in trees),
    }
