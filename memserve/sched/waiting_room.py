"""WaitingRoom: requests of one instance that do not run. Knows in which order they are asked; admits nobody.

    waiting     new ones, in the queue policy's order
    returning   preempted ones, and those whose KV has come: before the new ones of their level, in their order
    parked      those that wait for a copy between the media: their own, or one that brings what they share

Whoever waits for a copy is not in anybody's way. When it has ended, a request that moved its own KV returns with it;
one that waited for another's looks for it in the index again. Nor is a preempted one, for which there is no room, in
the way of those whose KV is in HBM.
"""

import heapq
import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memserve.kvcache.swaps import Swap
from memserve.request import Phase, Request
from memserve.sched.queue_policy import FCFS, QueuePolicy, key_of, level_of


@dataclass(frozen=True)
class _Parked:
    """is_own: the swap brings the request's own block table up."""

    request: Request
    swap: Swap
    is_own: bool


class Waiting(ABC):
    """New requests in a queue policy's order; of equal ones the one that arrived first, then the one added first."""

    def __init__(self, queue: QueuePolicy) -> None:
        self._queue = queue

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def append(self, request: Request) -> None:
        """Takes a request in."""

    @abstractmethod
    def remove(self, request: Request) -> None:
        """Takes a request out, which is here."""

    @abstractmethod
    def first(self, num_cached: Callable[[Request], int]) -> Request | None:
        """Who is asked next; it stays here. num_cached: tokens of a request in the index."""

    @abstractmethod
    def first_level(self) -> float:
        """Of whoever is asked next; infinite where nobody is here."""

    @abstractmethod
    def upcoming(self, most: int, num_cached: Callable[[Request], int]) -> list[Request]:
        """The first `most` of those here in the order in which they would be asked now."""


class ByIndex(Waiting):
    """Of an order that may look at the index, which changes between two steps: all keys are computed each time."""

    def __init__(self, queue: QueuePolicy) -> None:
        super().__init__(queue)
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: Request) -> None:
        self._requests.append(request)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def first(self, num_cached: Callable[[Request], int]) -> Request | None:
        return min(self._requests, key=lambda r: self._place(r, num_cached), default=None)

    def first_level(self) -> float:
        return min((level_of(self._queue, request) for request in self._requests), default=math.inf)

    def upcoming(self, most: int, num_cached: Callable[[Request], int]) -> list[Request]:
        return heapq.nsmallest(most, self._requests, key=lambda r: self._place(r, num_cached))

    def _place(self, request: Request, num_cached: Callable[[Request], int]) -> tuple[float, float, int]:
        return level_of(self._queue, request), key_of(self._queue, request, num_cached), request.arrival_ns


class ByArrival(Waiting):
    """Of FCFS and Priority, whose keys stay what they are: a heap, in which the entry of one taken out stays until it
    comes up.
    """

    def __init__(self, queue: QueuePolicy) -> None:
        super().__init__(queue)
        self._heap: list[tuple[float, float, int, Request]] = []
        self._number_of: dict[Request, int] = {}  # of its entry
        self._num_entries = 0

    def __len__(self) -> int:
        return len(self._number_of)

    def append(self, request: Request) -> None:
        self._num_entries += 1
        self._number_of[request] = self._num_entries
        level, key = level_of(self._queue, request), self._queue.key(request, _not_looked_at)
        heapq.heappush(self._heap, (level, key, self._num_entries, request))

    def remove(self, request: Request) -> None:
        del self._number_of[request]

    def first(self, num_cached: Callable[[Request], int]) -> Request | None:
        self._drop_gone()
        return self._heap[0][-1] if self._heap else None

    def first_level(self) -> float:
        self._drop_gone()
        return self._heap[0][0] if self._heap else math.inf

    def upcoming(self, most: int, num_cached: Callable[[Request], int]) -> list[Request]:
        there = (entry for entry in self._heap if self._number_of.get(entry[-1]) == entry[-2])
        return [entry[-1] for entry in heapq.nsmallest(most, there)]

    def _drop_gone(self) -> None:
        while self._heap and self._number_of.get(self._heap[0][-1]) != self._heap[0][-2]:
            heapq.heappop(self._heap)


def _not_looked_at(request: Request) -> int:
    raise AssertionError("the order of arrival does not depend on the index")


class WaitingRoom:
    """queue: the order of all requests here. returning: in the order in which they are asked."""

    def __init__(self, queue: QueuePolicy) -> None:
        self.queue = queue
        self.waiting: Waiting = ByArrival(queue) if type(queue).key is FCFS.key else ByIndex(queue)
        self.returning: list[Request] = []
        self._parked: list[_Parked] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.returning) + len(self._parked)

    @property
    def num_swapping(self) -> int:
        """Parked requests that hold blocks, as running ones do."""
        return sum(parked.is_own for parked in self._parked)

    def holders(self) -> Iterator[Request]:
        """Requests that may hold blocks while they wait."""
        yield from self.returning
        for parked in self._parked:
            yield parked.request

    def next(self, num_cached: Callable[[Request], int]) -> Request | None:
        """Who is asked next. num_cached: tokens of a request in the index."""
        if self.returning and self._level(self.returning[0]) <= self.waiting.first_level():
            return self.returning[0]
        return self.waiting.first(num_cached)

    def upcoming(self, most: int, admitted: Request, num_cached: Callable[[Request], int]) -> list[Request]:
        """Up to `most` of those that are asked next: who returns and then, levels aside, new ones; not `admitted`."""
        if not most:
            return []
        first = self.returning[: most + 1]
        found = first + self.waiting.upcoming(most + 1 - len(first), num_cached)
        return [request for request in found if request is not admitted][:most]

    def from_head(self, head: Request, num_hbm_blocks: int) -> Iterator[Request]:
        """The head, and who may be admitted instead where there is no room for that: of its level, whose KV is all in
        HBM, where nobody else can use those blocks meanwhile. What they grow by, the head may wait for longer.
        """
        yield head
        level = self._level(head)
        for request in [r for r in self.returning if r is not head and len(r.block_table)]:
            if self._level(request) == level and (request.block_table.view < num_hbm_blocks).all():
                yield request

    def put_first(self, request: Request) -> None:
        """Lets a request return before all others of its level."""
        self.returning.insert(bisect_left(self.returning, self._level(request), key=self._level), request)

    def put_last(self, request: Request) -> None:
        """Lets a request return after the others of its level that do."""
        self.returning.insert(bisect_right(self.returning, self._level(request), key=self._level), request)

    def _level(self, request: Request) -> float:
        return level_of(self.queue, request)

    def park(self, request: Request, swap: Swap, *, is_own: bool) -> None:
        """Lets a request that waits here wait for a swap."""
        self.remove(request)
        request.phase = Phase.SWAPPING_IN
        self._parked.append(_Parked(request, swap, is_own))

    def unpark(self) -> bool:
        """Those whose swap has ended wait for their turn again; whether there were any."""
        ready = [parked for parked in self._parked if parked.swap.has_ended]
        self._parked = [parked for parked in self._parked if not parked.swap.has_ended]
        own = [parked for parked in ready if parked.is_own]
        for parked in own:
            parked.swap.replace_in(parked.request.block_table)
        for parked in reversed(own):
            self.put_first(parked.request)
        for parked in ready:
            parked.request.phase = Phase.WAITING
            if not parked.is_own:
                self.waiting.append(parked.request)
        return bool(ready)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is."""
        if request.phase is Phase.SWAPPING_IN:
            self._parked = [parked for parked in self._parked if parked.request is not request]
        elif request in self.returning:
            self.returning.remove(request)
        else:
            self.waiting.remove(request)
