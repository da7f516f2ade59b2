"""EvictionQueue: nodes in eviction order, without walking anything. Knows keys and reference counts, no tree or tokens.

A heap with one entry a node. Keys only grow, so an entry may be too early but never too late: when it comes up with an
old key it is put back with the present one. A node of which everything is in use would come up at every eviction for
as long as it is: it is parked beside the heap, and comes back when nobody uses some block of it any more.
"""

import heapq
from typing import Generic, Protocol, TypeVar

import numpy as np

from memserve.kvcache.eviction import Evictable, Eviction, is_deeper, key_of, shrunk
from memserve.request import IntBuffer
from memserve.values import given_key

_NONE = np.empty(0, dtype=np.int32)
_TO_PARKED = 2  # places from a queue's bit to the one for nodes that it has parked


class Queueable(Evictable, Protocol):
    """A node that knows in which queues it waits, two bits a queue."""

    queued: int


Node = TypeVar("Node", bound=Queueable)


class EvictionQueue(Generic[Node]):
    """refcounts: the allocator's, int32 [all blocks].  bit: this queue's bit in a node's `queued`, 1 or 2."""

    def __init__(self, policy: Eviction, refcounts: np.ndarray, bit: int = 1) -> None:
        self._policy = policy
        self._bit, self._parked_bit = bit, bit << _TO_PARKED
        self._heap: list[tuple[tuple[float, ...], int, Node]] = []  # (key, tie-breaker, node)
        self._num_pushed = self._last_popped = 0
        self._num_forgotten = 0  # of those in the heap
        self._parked: _Parked[Node] = _Parked(refcounts)

    def offer(self, node: Node) -> None:
        """Puts a node in, unless it is in."""
        if not node.queued & (self._bit | self._parked_bit):
            node.queued |= self._bit
            self._num_pushed += 1
            heapq.heappush(self._heap, (key_of(self._policy, node), self._num_pushed, node))

    def pop(self) -> Node | None:
        """Takes out the node that goes first; None when there is none.

        Raises ValueError where the policy's key of a node has become smaller, or is no tuple of numbers.
        """
        while self._heap:
            key, self._last_popped, node = heapq.heappop(self._heap)
            if not node.queued & self._bit:
                self._num_forgotten -= 1
                continue
            node.queued &= ~self._bit
            present = self._policy.key(node)
            if present == key:
                return node
            if not given_key(self._policy, "key", present) > key:
                if is_deeper(self._policy, key, present):
                    return node
                raise shrunk(self._policy, key, present)
            self.offer(node)
        return None

    def put_back(self, node: Node) -> None:
        """Puts back in who was popped last, before those of the same key, as if it had not been popped."""
        node.queued |= self._bit
        heapq.heappush(self._heap, (self._policy.key(node), self._last_popped, node))

    def park(self, node: Node, blocks: np.ndarray) -> None:
        """Puts a node aside that was popped, until somebody stops using one of `blocks` (int32 [n], all in use)."""
        node.queued |= self._parked_bit
        self._parked.add(node, blocks)

    def unpark(self) -> None:
        """Puts back what was parked and has a block that nobody uses; to be called before the first `pop` of a call."""
        for node in self._parked.take_idle():
            node.queued &= ~self._parked_bit
            self.offer(node)

    def reoffer(self, node: Node) -> None:
        """Puts a parked node back in at once: it has other blocks now. Leaves those as they are that are not parked."""
        if node.queued & self._parked_bit:
            self._unpark(node)
            self.offer(node)

    def forget(self, node: Node) -> None:
        """For a node that is gone for good: its entry is skipped, and swept out before most entries are such."""
        if node.queued & self._parked_bit:
            self._unpark(node)
        if node.queued & self._bit:
            node.queued &= ~self._bit
            self._num_forgotten += 1
            if 2 * self._num_forgotten > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[2].queued & self._bit]
                heapq.heapify(self._heap)
                self._num_forgotten = 0

    def _unpark(self, node: Node) -> None:
        node.queued &= ~self._parked_bit
        self._parked.drop(node)


class _Parked(Generic[Node]):
    """Nodes and the blocks they wait for."""

    def __init__(self, refcounts: np.ndarray) -> None:
        self._refcounts = refcounts
        self._nodes: dict[int, Node] = {}
        self._number_of: dict[Node, int] = {}
        self._num_added = 0
        self._blocks, self._numbers = IntBuffer(_NONE), IntBuffer(_NONE)  # of equal length: a block, its node's number

    def add(self, node: Node, blocks: np.ndarray) -> None:
        self._nodes[self._num_added], self._number_of[node] = node, self._num_added
        self._blocks.extend(blocks)
        self._numbers.extend(np.full(len(blocks), self._num_added, dtype=np.int32))
        self._num_added += 1

    def take_idle(self) -> list[Node]:
        """Takes out the nodes of blocks that the index alone holds, or that are no longer where they were."""
        if not self._nodes:
            return []
        idle = self._refcounts.take(self._blocks.view) <= 1
        if not idle.any():
            return []
        leaving = np.unique(self._numbers.view[idle])
        self._keep(~np.isin(self._numbers.view, leaving))
        nodes = [self._nodes.pop(number) for number in leaving.tolist()]
        for node in nodes:
            del self._number_of[node]
        return nodes

    def drop(self, node: Node) -> None:
        """Takes out a node that waits for nothing any more, lest one that is parked often is here as often."""
        number = self._number_of.pop(node)
        del self._nodes[number]
        self._keep(self._numbers.view != number)

    def _keep(self, stays: np.ndarray) -> None:
        """stays: bool, of each block here."""
        blocks, numbers = self._blocks.view[stays], self._numbers.view[stays]
        self._blocks, self._numbers = IntBuffer(blocks), IntBuffer(numbers)
