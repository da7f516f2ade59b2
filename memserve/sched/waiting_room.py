"""WaitingRoom: requests of one instance that do not run. Knows in which order they are asked; admits nobody.

    waiting     new ones, in the queue policy's order
    returning   preempted ones, and those whose KV has come: before all others, in their order
    parked      those that wait for a copy between the media: their own, or one that brings what they share

Whoever waits for a copy is not in anybody's way. When it has ended, a request that moved its own KV returns with it;
one that waited for another's looks for it in the index again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memserve.kvcache.swaps import Swap
from memserve.request import Phase, Request
from memserve.sched.queue_policy import QueuePolicy


@dataclass(frozen=True)
class _Parked:
    """is_own: the swap brings the request's own block table up."""

    request: Request
    swap: Swap
    is_own: bool


class WaitingRoom:
    """queue: which of the new ones is asked next."""

    def __init__(self, queue: QueuePolicy) -> None:
        self.waiting: list[Request] = []
        self.returning: list[Request] = []
        self._parked: list[_Parked] = []
        self._queue = queue

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
        if self.returning:
            return self.returning[0]
        return min(self.waiting, key=lambda r: self._queue.key(r, num_cached), default=None)

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
        self.returning[:0] = [parked.request for parked in own]
        self.waiting += [parked.request for parked in ready if not parked.is_own]
        for parked in ready:
            parked.request.phase = Phase.WAITING
        return bool(ready)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is."""
        if request.phase is Phase.SWAPPING_IN:
            self._parked = [parked for parked in self._parked if parked.request is not request]
        else:
            (self.returning if request in self.returning else self.waiting).remove(request)
