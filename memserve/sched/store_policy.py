"""Store policies: what of a request's KV goes to the cluster's store, an instance that keeps KV and serves nobody.

Asked where a request has left KV in its instance's index, knows numbers alone, and moves nothing (deposits.py does). A
policy of one's own is one class, named in the config by `store._target_=my_package.MyPolicy`.
"""

from abc import ABC, abstractmethod

from memserve.values import require_int


class StorePolicy(ABC):
    """max_waiting: prefixes that may wait at an instance for their turn; of more, the one that waits longest is
    dropped, and counted.
    """

    max_waiting = 64

    @abstractmethod
    def num_offered(self, num_tokens: int) -> int:
        """How many of the first num_tokens tokens of a request, whose KV is cached here, the store is offered."""


class NoStore(StorePolicy):
    """Nothing is kept but where it was computed. The baseline."""

    def num_offered(self, num_tokens: int) -> int:
        return 0


class WriteThrough(StorePolicy):
    """All that a request leaves. The store takes what it lacks of that.

    Raises ValueError for a max_waiting out of range.
    """

    def __init__(self, max_waiting: int = 64) -> None:
        self.max_waiting = require_int("store.max_waiting", max_waiting, 1)

    def num_offered(self, num_tokens: int) -> int:
        return num_tokens
