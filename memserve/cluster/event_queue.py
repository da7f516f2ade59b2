"""EventQueue: what happens when, in virtual time. Knows the order; not what it means.

At the same nanosecond: calls first, then what comes from other instances, in order of creation; timers, ends of steps,
begins, evictions within macro-steps, each by the instances' numbers, since when they were created depends on those.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

from memserve.cluster.emulated_node import Node
from memserve.messages import PoolMessage

PEER, TIMER, END, BEGIN, EVICTION = 0, 1, 2, 3, 4


class Event(NamedTuple):
    """Something that happens at a node. what: (sender, message) from a peer, else the node's epoch."""

    time_ns: int
    kind: int
    instance: int  # its number; 0 for what comes from a peer
    number: int
    node: Node
    what: int | tuple[int, PoolMessage]


class EventQueue:
    """Events of nodes, and calls that somebody asked for."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._calls: list[tuple[int, int, Callable[[], None]]] = []
        self._num_created = 0

    @property
    def next_call_ns(self) -> int | None:
        return self._calls[0][0] if self._calls else None

    @property
    def next_event_ns(self) -> int | None:
        return self._events[0].time_ns if self._events else None

    def is_after(self, time_ns: int) -> bool:
        """Whether all events come after what happens on the wires at time_ns, which has the place of a timer."""
        return not self._events or (time_ns, TIMER) <= self._events[0][:2]

    def push(self, time_ns: int, kind: int, node: Node, what: int | tuple[int, PoolMessage]) -> None:
        """Something is to happen at a node."""
        self._num_created += 1
        instance = 0 if kind == PEER else node.incarnation
        heapq.heappush(self._events, Event(time_ns, kind, instance, self._num_created, node, what))

    def set_timer(self, node: Node, time_ns: int | None, now_ns: int) -> None:
        """A node is to be looked at at time_ns, or before; None: for nothing."""
        if time_ns is None:
            return
        time_ns = max(time_ns, now_ns)
        if node.timer_ns is None or time_ns < node.timer_ns:
            node.timer_ns = time_ns
            self.push(time_ns, TIMER, node, 0)

    def set_eviction(self, node: Node) -> None:
        """A node is to be looked at where its macro-step evicts next, if somebody is to be told of that."""
        if (time_ns := node.next_eviction_ns()) is not None:
            self.push(time_ns, EVICTION, node, node.epoch)

    def is_due(self, event: Event, wanted_ns: Callable[[Node], int | None]) -> bool:
        """Whether anything still waits for a timer; what it was set for may have ended long ago, and then it is set for
        what is wanted next. wanted_ns: says when a node wants to be looked at.
        """
        node = event.node
        if event.time_ns != node.timer_ns:
            return False
        next_ns = wanted_ns(node)
        if next_ns is not None and next_ns <= event.time_ns:
            return True
        node.timer_ns = None
        self.set_timer(node, next_ns, event.time_ns)
        return False

    def call_at(self, time_ns: int, call: Callable[[], None]) -> None:
        """`call` is to be called, before anything else that happens then."""
        self._num_created += 1
        heapq.heappush(self._calls, (time_ns, self._num_created, call))

    def pop_event(self) -> Event:
        return heapq.heappop(self._events)

    def pop_call(self) -> Callable[[], None]:
        return heapq.heappop(self._calls)[2]
