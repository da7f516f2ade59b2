"""Store policies: what of an instance's KV goes to the cluster's stores, instances that keep KV and serve nobody.

Asked where a request has left KV in its instance's index, and how far ahead of eviction to look; knows numbers alone,
and moves nothing (deposits.py does). A policy of one's own is one class, named in the config by
`store._target_=my_package.MyPolicy`.
"""

import math
from abc import ABC, abstractmethod

import numpy as np

from memserve.mixing import digest64, mix64
from memserve.values import require_int, require_number


class StorePolicy(ABC):
    """max_waiting: prefixes that may wait at an instance for their turn; of more, the one that waits longest is
    dropped, and counted.  max_incoming: so many offers a store takes at a time, and tells others to come again: KV that
    is on its way is held where it comes from, and of many at once each takes as long as all.  asks_index: it goes by
    how often blocks were used, or by what is evicted next, which not every index tells (Index.ranks_blocks).  renews:
    what was offered, and is cached here since, is offered again whenever a request leaves it: that renews its place in
    the store.
    """

    max_waiting = 64
    max_incoming = 4
    asks_index = True
    renews = False

    @abstractmethod
    def num_offered(self, uses: np.ndarray) -> int:
        """How many of the blocks that a request leaves in the cache, from the first on, the store is offered now.

        uses: int64 [n], how often each was used here (eviction.Evictable); never more than the block before it.
        """

    def num_ahead(self, num_blocks: int) -> int:
        """How many blocks that are evicted next are to have been offered, the free ones counted. num_blocks: in HBM."""
        return 0

    def place(self, tokens: np.ndarray, offered_to: np.ndarray, stores: np.ndarray) -> int:
        """To which of several stores a prefix goes: a row of `stores`.

        tokens: int32 [n * block_size].  offered_to: int64 [n], the row to which each of its blocks was offered before,
        -1 where to none.  stores: int64 [m], the numbers of those that are there.
        A store has all of a prefix or what it begins with. So what continues a prefix follows it, if that is half of it
        at least: a conversation stays together, and what all prompts begin with draws nobody. Anything else goes by a
        hash of all of its tokens, on which instances agree, and of which a store that is lost takes none from others
        (rendezvous hashing; Thaler and Ravishankar, 1998).
        """
        known = np.flatnonzero(offered_to >= 0)
        if len(known) and 2 * (known[-1] + 1) >= len(offered_to):
            return int(offered_to[known[-1]])
        digest = np.uint64(digest64(tokens.tobytes()))
        return int(np.argmax(mix64(mix64(stores.astype(np.uint64)) ^ digest)))


class NoStore(StorePolicy):
    """Nothing is kept but where it was computed. The baseline."""

    asks_index = False

    def num_offered(self, uses: np.ndarray) -> int:
        return 0


class WriteThrough(StorePolicy):
    """All that a request leaves. The store takes what it lacks of that.

    Raises ValueError for values out of range.
    """

    asks_index = False
    renews = True

    def __init__(self, max_waiting: int = 64, max_incoming: int = 4) -> None:
        self.max_waiting = require_int("store.max_waiting", max_waiting, 1)
        self.max_incoming = require_int("store.max_incoming", max_incoming, 1)

    def num_offered(self, uses: np.ndarray) -> int:
        return len(uses)


class WriteThroughSelective(StorePolicy):
    """Of what a request leaves, the beginning that was used at least min_hits times here, as SGLang's HiCache does.

    The request that brings KV here uses it for the first time, by computing it or since it was sent for it; each that
    finds it here, and each other instance that is sent it, once more. At 2, what is used once is not written. Raises
    ValueError for values out of range.
    """

    def __init__(self, min_hits: int = 2, max_waiting: int = 64, max_incoming: int = 4) -> None:
        self._min_hits = require_int("store.min_hits", min_hits, 1)
        self.max_waiting = require_int("store.max_waiting", max_waiting, 1)
        self.max_incoming = require_int("store.max_incoming", max_incoming, 1)

    def num_offered(self, uses: np.ndarray) -> int:
        return int(np.count_nonzero(uses >= self._min_hits))


class WriteBack(StorePolicy):
    """What is about to leave the instance, and nothing before that.

    ahead_share: of as many blocks as it has in HBM, how many are to be free, or offered before they are evicted; above
    0, up to 1. It is a share since a pool's blocks are often given in bytes, and differ from role to role. Raises
    ValueError for one out of range.
    """

    def __init__(self, ahead_share: float = 0.1, max_incoming: int = 4) -> None:
        self.max_incoming = require_int("store.max_incoming", max_incoming, 1)
        allowed = "a number above 0, up to 1"
        self._share = require_number("store.ahead_share", ahead_share, allowed, minimum=0, maximum=1, exclusive=True)

    def num_offered(self, uses: np.ndarray) -> int:
        return 0

    def num_ahead(self, num_blocks: int) -> int:
        return math.ceil(self._share * num_blocks)
