"""Eviction order: which leaf of the index goes first. A policy is a class with one method that returns a sort key.

The smallest key goes first. A key may only grow while its node lives (each use moves it later), which lets the index
keep leaves in a heap and correct an entry when it comes up.
"""

from abc import ABC, abstractmethod
from typing import Protocol


class Evictable(Protocol):
    """What a policy may look at. `last_used`: the index operation (counted from 1) that last used the node."""

    last_used: int


class Eviction(ABC):
    """Eviction order."""

    @abstractmethod
    def key(self, node: Evictable) -> float:
        """The node's place in the order; the smallest is evicted first."""


class LRU(Eviction):
    """Least recently used first. Among equally old nodes the deepest goes first, since only leaves can go."""

    def key(self, node: Evictable) -> float:
        return node.last_used
