"""Group: the instances of one role as the global scheduler sees them: who there is, and what each has to do."""

from collections.abc import Collection, Sequence

import numpy as np

from memserve.sched.routing import ClusterSnapshot, Policy, RouteRequest


class Group:
    """labels: of the instances, a row each.  incarnations: their numbers.  policy: chooses among them."""

    def __init__(self, labels: Sequence[str], incarnations: Sequence[int], policy: Policy) -> None:
        self.labels, self.incarnations = list(labels), list(incarnations)
        self._policy = policy
        self._num_requests = np.zeros(len(labels), dtype=np.int64)
        self._num_tokens = np.zeros(len(labels), dtype=np.int64)
        self._num_routed = 0
        self._gone: set[int] = set()

    def remove(self, label: str) -> int | None:
        """An instance is gone for good: nothing is routed to it any more. Its row, None for one of another group."""
        if label not in self.labels:
            return None
        row = self.labels.index(label)
        self._gone.add(row)
        return row

    def restore(self, label: str) -> None:
        """An instance that was taken for gone is there again."""
        if label in self.labels:
            self._gone.discard(self.labels.index(label))

    def rows(self, tried: Collection[int] = ()) -> list[int]:
        """Who can take a request, without the rows that were tried."""
        return [row for row in range(len(self.labels)) if row not in tried and row not in self._gone]

    def snapshot(self, tried: Collection[int] = ()) -> ClusterSnapshot:
        """What the policy sees now, without the rows that were tried."""
        rows = self.rows(tried)
        labels = [self.labels[row] for row in rows]
        return ClusterSnapshot(labels, self._num_requests[rows], self._num_tokens[rows], self._num_routed)

    def route(self, request: RouteRequest, rng: np.random.Generator, tried: Collection[int] = ()) -> int:
        """The row that takes the request, counted there. Raises ValueError for a row that is none."""
        snapshot = self.snapshot(tried)
        chosen = self._policy.choose(request, snapshot, rng)
        if not 0 <= chosen < len(snapshot.labels):
            raise ValueError(
                f"{type(self._policy).__name__} chose row {chosen}: expected 0 to {len(snapshot.labels) - 1}"
            )
        row = self.labels.index(snapshot.labels[chosen])
        self._num_routed += not tried
        self._num_requests[row] += 1
        self._num_tokens[row] += len(request.tokens)
        return row

    def forget(self, row: int, num_tokens: int) -> None:
        """A request has ended on a row, or left it."""
        self._num_requests[row] -= 1
        self._num_tokens[row] -= num_tokens
