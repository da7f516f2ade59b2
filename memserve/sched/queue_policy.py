"""Queue order: which waiting request is admitted next, and which running one gives up its blocks for others.

A policy is a class with one method that returns a sort key. It may also put requests on levels, which count before
everything else: whoever has a smaller level comes first, be it new, preempted, or handed over with its KV, and keeps
its blocks for longer. On one level preempted requests and those that come with their KV go before new ones, new ones
by their keys, ties to the earlier request, and whoever was admitted last is preempted first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from memserve.request import Request
from memserve.values import given_number, wrong_return


class QueuePolicy(ABC):
    """Order of an instance's requests. looks_at_priority: `Request.priority` has a part in it."""

    looks_at_priority = False

    @abstractmethod
    def key(self, request: Request, num_cached: Callable[[Request], int]) -> float:
        """A new request's place on its level; the smallest is admitted first. `num_cached` counts its tokens in the
        local index.
        """

    def level(self, request: Request) -> float:
        """What a request always has, and is served by before others; one level for all unless a policy has more."""
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        """Who of those that run (in order of admission, at least one) is preempted, so that others have its blocks."""
        return max(reversed(running), key=self.level)


class FCFS(QueuePolicy):
    """First come, first served."""

    def key(self, request: Request, num_cached: Callable[[Request], int]) -> float:
        return request.arrival_ns


class Priority(FCFS):
    """The smallest `priority` first, of equal ones the first to come; the others are preempted first (vLLM's order).

    Nobody who runs is preempted for one that waits, and one that waits behind more urgent ones may wait for ever.
    """

    looks_at_priority = True

    def level(self, request: Request) -> float:
        return request.priority

    def victim(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=lambda request: (request.priority, request.arrival_ns))


class LongestPrefixFirst(QueuePolicy):
    """The longest cached prefix first, so that what is cached is used before it is evicted (SGLang's order)."""

    def key(self, request: Request, num_cached: Callable[[Request], int]) -> float:
        return -num_cached(request)


def level_of(queue: QueuePolicy, request: Request) -> float:
    """A request's level. Raises ValueError where that is no number: among others there would be no order."""
    return given_number(queue, "level", queue.level(request), repr(request.request_id))


def key_of(queue: QueuePolicy, request: Request, num_cached: Callable[[Request], int]) -> float:
    """A request's key, as `level_of`."""
    return given_number(queue, "key", queue.key(request, num_cached), repr(request.request_id))


def victim_of(queue: QueuePolicy, running: Sequence[Request]) -> Request:
    """Who of those that run is preempted. Raises ValueError where that is none of them."""
    victim = queue.victim(running)
    if not any(victim is request for request in running):
        names = ", ".join(repr(request.request_id) for request in running)
        raise wrong_return(queue, "victim", victim, f"one of the requests that run: {names}")
    return victim
