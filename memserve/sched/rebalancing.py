"""Rebalancing: which answers go on at another instance of their role while both stay. Knows columns; moves nothing.

Where a request goes is chosen once, before anybody knows how long its answer will be. Later one instance may have to
preempt while another has room: request migration (Table 3) mends that, as Llumnix (arXiv 2406.03243) does. A policy of
one's own is one class, named in the config by `rebalancing._target_=my_package.MyRebalancing`.
"""

from abc import ABC, abstractmethod

import numpy as np

from memserve.sched.departures import Answer
from memserve.sched.routing import ClusterSnapshot
from memserve.values import require_int, require_number


class Rebalancing(ABC):
    """Asked about an instance whenever that has said how much room it has: when a request has come or gone there.

    An answer is on its way from an instance, or to one, before the next one leaves it or goes there.
    looks_at_loads: it wants to be asked.
    """

    looks_at_loads = True

    @abstractmethod
    def target(self, source: int, cluster: ClusterSnapshot) -> int | None:
        """The row to which an answer of row `source` is to go; None: all stay. Rows are those of decoding instances
        that are there, without others that an answer is on its way from or to. A pure function.
        """

    @abstractmethod
    def key(self, answer: Answer) -> tuple[float, ...]:
        """Of the answers that are decoded at the source, the one with the least of this goes."""


class NoRebalancing(Rebalancing):
    """An answer ends where it began. The baseline."""

    looks_at_loads = False

    def target(self, source: int, cluster: ClusterSnapshot) -> int | None:
        return None

    def key(self, answer: Answer) -> tuple[float, ...]:
        return ()


class ByRoom(Rebalancing):
    """From an instance of whose blocks less than `low` (a share) are free to the one with the largest share free, if
    that is more than `high`. What nobody holds is free. The oldest of the least urgent answers goes: it has the most
    KV by now, and nobody who comes later takes its blocks. Raises ValueError unless 0 <= low <= high <= 1.
    """

    def __init__(self, low: float = 0.1, high: float = 0.3) -> None:
        self._low = require_number("rebalancing.low", low, "a number in [0, 1]", minimum=0.0, maximum=1.0)
        self._high = require_number("rebalancing.high", high, "a number in [0, 1]", minimum=0.0, maximum=1.0)
        if self._low > self._high:
            raise ValueError(f"rebalancing.low={low} is above rebalancing.high={high}: expected no more")

    def target(self, source: int, cluster: ClusterSnapshot) -> int | None:
        free = shares_free(cluster)
        best = int(free.argmax())
        return best if free[source] < self._low and free[best] > self._high else None

    def key(self, answer: Answer) -> tuple[float, ...]:
        return -answer.priority, answer.arrival_s


class ByAnswers(Rebalancing):
    """From an instance that decodes more than `gap` answers more than another to the one that decodes the fewest. The
    newest goes, which has the most to come. Raises ValueError for a gap below 1.

    For those who route by prefixes alone: an answer is begun where its prompt is cached, and goes on where there is
    less to do.
    """

    def __init__(self, gap: int = 2) -> None:
        self._gap = require_int("rebalancing.gap", gap, 1)

    def target(self, source: int, cluster: ClusterSnapshot) -> int | None:
        least = int(cluster.num_decoding.argmin())
        return least if cluster.num_decoding[source] - cluster.num_decoding[least] > self._gap else None

    def key(self, answer: Answer) -> tuple[float, ...]:
        return (-answer.arrival_s,)


def shares_free(cluster: ClusterSnapshot) -> np.ndarray:
    """float64 [n]: of each instance's blocks, the share that nobody held; 1 of one that has said nothing yet."""
    free, num_blocks, shares = cluster.free_blocks, cluster.num_blocks, np.ones(len(cluster.labels))
    np.divide(free, num_blocks, where=np.isfinite(num_blocks), out=shares)
    return shares
