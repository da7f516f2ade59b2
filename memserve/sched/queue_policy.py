"""Queue order: which waiting request is admitted next. A policy is a class with one method that returns a sort key.

Preempted requests come first whatever the policy says; ties go to the earlier request.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from memserve.request import Request


class QueuePolicy(ABC):
    """Order of the waiting queue."""

    @abstractmethod
    def key(self, request: Request, num_cached: Callable[[Request], int]) -> float:
        """The request's place; the smallest is admitted first. `num_cached` counts its tokens in the local index."""


class FCFS(QueuePolicy):
    """First come, first served."""

    def key(self, request: Request, num_cached: Callable[[Request], int]) -> float:
        return request.arrival_ns


class LongestPrefixFirst(QueuePolicy):
    """The longest cached prefix first, so that what is cached is used before it is evicted (SGLang's order)."""

    def key(self, request: Request, num_cached: Callable[[Request], int]) -> float:
        return -num_cached(request)
