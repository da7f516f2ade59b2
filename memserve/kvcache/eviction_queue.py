"""EvictionQueue: nodes in eviction order, without walking anything. Knows keys; nothing of trees, tokens or blocks.

A heap with one entry a node. Keys only grow, so an entry may be too early but never too late: when it comes up with an
old key it is put back with the present one.
"""

import heapq
from typing import Generic, Protocol, TypeVar

from memserve.kvcache.eviction import Evictable, Eviction


class Queueable(Evictable, Protocol):
    """A node that knows in which queues it waits, one bit a queue."""

    queued: int


Node = TypeVar("Node", bound=Queueable)


class EvictionQueue(Generic[Node]):
    """bit: this queue's bit in a node's `queued`."""

    def __init__(self, policy: Eviction, bit: int = 1) -> None:
        self._policy = policy
        self._bit = bit
        self._heap: list[tuple[tuple[float, ...], int, Node]] = []  # (key, tie-breaker, node)
        self._num_pushed = 0
        self._num_forgotten = 0  # of those in the heap

    def offer(self, node: Node) -> None:
        """Puts a node in, unless it is in."""
        if not node.queued & self._bit:
            node.queued |= self._bit
            self._num_pushed += 1
            heapq.heappush(self._heap, (self._policy.key(node), self._num_pushed, node))

    def pop(self) -> Node | None:
        """Takes out the node that goes first; None when there is none."""
        while self._heap:
            key, _, node = heapq.heappop(self._heap)
            if not node.queued & self._bit:
                self._num_forgotten -= 1
                continue
            node.queued &= ~self._bit
            if self._policy.key(node) == key:
                return node
            self.offer(node)
        return None

    def forget(self, node: Node) -> None:
        """For a node that is gone for good: its entry is skipped, and swept out before most entries are such."""
        if node.queued & self._bit:
            node.queued &= ~self._bit
            self._num_forgotten += 1
            if 2 * self._num_forgotten > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].queued & self._bit]
                heapq.heapify(self._heap)
                self._num_forgotten = 0
