"""Alarms: when time alone does something to each of many tickets, and to which it does now. Knows no ticket but by key.

    put(key, time_ns) -> next_ns() -> due(now_ns): the keys whose time has come, until they are put anew or dropped

Asked at every event of a cluster, so that it must not look at all of them: a heap, in which what was put anew or
dropped stays until it comes to the top, or is the greater part.
"""

import heapq
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=tuple[int, ...])
_FEW = 64  # entries that nobody minds


class Alarms(Generic[Key]):
    """At most one time for each key."""

    def __init__(self) -> None:
        self._times_ns: dict[Key, int] = {}
        self._heap: list[tuple[int, Key]] = []

    def put(self, key: Key, time_ns: int | None) -> None:
        """Instead of the key's time before; None: never."""
        if time_ns is None:
            self._times_ns.pop(key, None)
        elif self._times_ns.get(key) != time_ns:
            self._times_ns[key] = time_ns
            heapq.heappush(self._heap, (time_ns, key))
        if len(self._heap) > 2 * len(self._times_ns) + _FEW:
            self._heap = [(time_ns, key) for key, time_ns in self._times_ns.items()]
            heapq.heapify(self._heap)

    def next_ns(self) -> int | None:
        """The earliest time; None if there is none."""
        while self._heap and not self._holds(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now_ns: int) -> list[Key]:
        """The keys whose time is not after now_ns, in their order."""
        keys: set[Key] = set()
        while self._heap and self._heap[0][0] <= now_ns:
            entry = heapq.heappop(self._heap)
            if self._holds(entry):
                keys.add(entry[1])
        for key in keys:
            heapq.heappush(self._heap, (self._times_ns[key], key))
        return sorted(keys)

    def _holds(self, entry: tuple[int, Key]) -> bool:
        return self._times_ns.get(entry[1]) == entry[0]
