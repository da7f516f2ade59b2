"""Eviction order: which leaf of the index goes first. A policy is a class with one method that returns a sort key.

The smallest key goes first. A key may only grow while its node lives (each use moves it later), which lets the index
keep leaves in a heap and correct an entry when it comes up. Time is counted in index operations, not in seconds: the
order is the same on every machine.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

from memserve.values import given_key


class Evictable(Protocol):
    """What a policy may look at.

    born, last_used: the index operations (counted from 1) that inserted the node and last used it.  num_uses: how often
    it was looked up, and once for its insertion: by each request that found it here, once, and by each other instance
    that was sent it for one of its own. A prompt that is entered chunk by chunk has not used its own beginning each
    time, nor has one that was preempted and starts again.  num_tokens_before, num_tokens_end: tokens before it, and
    with its own. num_tokens_end shrinks when a node's last blocks are evicted and its first ones stay: a key that grows
    with it would shrink too, and is refused.
    """

    born: int
    last_used: int
    num_uses: int
    num_tokens_before: int

    @property
    def num_tokens_end(self) -> int: ...


class Eviction(ABC):
    """Eviction order."""

    @abstractmethod
    def key(self, node: Evictable) -> tuple[float, ...]:
        """The node's place in the order: a tuple of numbers, of which the smallest is evicted first."""


class LRU(Eviction):
    """Least recently used first. Among equally old nodes the deepest goes first, since only leaves can go."""

    def key(self, node: Evictable) -> tuple[float, ...]:
        return (node.last_used,)


class LFU(Eviction):
    """Least often used first, then least recently."""

    def key(self, node: Evictable) -> tuple[float, ...]:
        return (node.num_uses, node.last_used)


class FIFO(Eviction):
    """First inserted, first evicted."""

    def key(self, node: Evictable) -> tuple[float, ...]:
        return (node.born,)


class CostAware(Eviction):
    """Least recently used, with a bonus for what is dear to recompute per byte.

    A token's KV takes the same bytes at every position, but computing it costs 1 + position / attention_tokens: the
    attention over its prefix grows with the position (section 5.3's quadratic term). Each doubling of that cost lets a
    node stay `horizon` index operations longer.

    attention_tokens: prefix length at which attention costs as much as the rest of the token.  horizon: operations.
    """

    def __init__(self, attention_tokens: float = 4096.0, horizon: float = 100.0) -> None:
        for name, value in (("attention_tokens", attention_tokens), ("horizon", horizon)):
            if not 0 < value < float("inf"):
                raise ValueError(f"eviction.{name}={value}: expected a finite number > 0")
        self._attention_tokens = attention_tokens
        self._horizon = horizon

    def key(self, node: Evictable) -> tuple[float, ...]:
        cost = 1.0 + node.num_tokens_before / self._attention_tokens
        return (node.last_used + self._horizon * math.log2(cost),)


class DeepestFirst(Eviction):
    """Another order, in which the deeper of two equal nodes goes first; where any node may go, not only leaves.

    Depth is where a node ends: cutting its head off leaves that as it is. A leaf that is continued, and keeps its key
    of that order, becomes deeper, and its key here smaller than it was: see `is_deeper`.
    """

    def __init__(self, order: Eviction) -> None:
        self.order = order

    def key(self, node: Evictable) -> tuple[float, ...]:
        return (*key_of(self.order, node), -node.num_tokens_end)


def key_of(order: Eviction, node: Evictable) -> tuple[float, ...]:
    """A node's key. Raises ValueError where that is no tuple of numbers: among others there would be no order."""
    return given_key(order, "key", order.key(node))


def is_deeper(order: Eviction, before: tuple[float, ...], now: tuple[float, ...]) -> bool:
    """Whether a key of DeepestFirst is smaller than before since its node was continued. Such a node can go at once:
    all others come after its key of before, which came after those of nodes below it, and before those of nodes above.
    """
    return isinstance(order, DeepestFirst) and before[:-1] == now[:-1]


def shrunk(order: Eviction, before: tuple[float, ...], now: tuple[float, ...]) -> ValueError:
    """What is raised where the key of a node was another before, and is not larger now. Of DeepestFirst, it is said of
    the order that it was given.
    """
    if isinstance(order, DeepestFirst):
        return shrunk(order.order, before[:-1], now[:-1])
    return ValueError(
        f"{type(order).__name__}.key gave {before}, then {now} for the same node: expected it only to grow"
    )
