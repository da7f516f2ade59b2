"""Unserved: requests for which no instance of a role is left, while they wait for one to come. Knows names and times.

Each waits patience_ns from when it was put there; with 0 nobody waits.
"""

from memserve.clock import to_s


class Unserved:
    """In the order in which they came, which is also that in which their time is up."""

    def __init__(self, patience_ns: int) -> None:
        self.patience_ns = patience_ns
        self._until_ns: dict[str, int] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._until_ns

    @property
    def next_time_ns(self) -> int | None:
        """When somebody's time is up; None while nobody waits."""
        return next(iter(self._until_ns.values()), None)

    def add(self, request_id: str, now_ns: int) -> None:
        self._until_ns[request_id] = now_ns + self.patience_ns

    def discard(self, request_id: str) -> None:
        self._until_ns.pop(request_id, None)

    def expired(self, now_ns: int) -> list[str]:
        """Those whose time is up; they wait no longer."""
        ids = [request_id for request_id, until_ns in self._until_ns.items() if until_ns <= now_ns]
        for request_id in ids:
            self.discard(request_id)
        return ids

    def why(self, missing: str | None) -> str:
        """Why one whose time is up fails. missing: the kind of instance that it waited for."""
        return f"no {missing} is left, and none came within cluster.patience_s={to_s(self.patience_ns):g}"

    def drain(self) -> list[str]:
        """All of them; they wait no longer."""
        ids = list(self._until_ns)
        self._until_ns.clear()
        return ids
