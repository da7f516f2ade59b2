"""Heirs: who gets what an instance that leaves has cached. Knows loads and names; moves nothing (bequest.py does).

An instance is asked for when one begins to drain, and once more when that has nothing left to do: then it gives what
is new. A policy of one's own is one class, named in the config by `heir._target_=my_package.MyHeir`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from memserve.sched.scaling import Load
from memserve.values import require_number


class Heir(ABC):
    """share: of as many blocks as a pool has in HBM, what an heir is offered at most by one that leaves; in 0 to 1."""

    share = 1.0

    @abstractmethod
    def choose(self, leaving: Load, others: Sequence[Load]) -> str | None:
        """The label of one of `others`, which serve in the role of the one that leaves; None: nobody gets anything."""


class NoHeir(Heir):
    """What is cached is lost with the instance. The baseline."""

    share = 0.0

    def choose(self, leaving: Load, others: Sequence[Load]) -> str | None:
        return None


class LeastLoadHeir(Heir):
    """Whoever has least to do, of equal ones the first.

    share: above 0, up to 1. The heir lets go of as much of what it has cached itself, so that at .5 the halves that
    both would have kept longest are left of two full caches. Raises ValueError for one out of range.
    """

    def __init__(self, share: float = 0.5) -> None:
        allowed = "a number above 0, up to 1"
        self.share = require_number("heir.share", share, allowed, minimum=0, maximum=1, exclusive=True)

    def choose(self, leaving: Load, others: Sequence[Load]) -> str | None:
        return min(others, key=lambda load: load.num_requests).label if others else None
