"""Index: token prefix -> blocks, the paper's local index (section 4.2). Knows block numbers and tokens, no tensors.

Whole blocks only. Input is a C-contiguous int32 array; keys are the tokens' bytes, never a Python hash. An index holds
its blocks under one name, ("index",), through the pool; it reads the allocator's reference counts to know what it may
evict: a block that nobody else holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memserve.kvcache.address import Medium
from memserve.kvcache.events import EventLog, NobodyFollows

_NO_BLOCKS = np.empty(0, dtype=np.int32)


def require_block_size(value: int) -> int:
    """Tokens in a block, an integer >= 1. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"block_size={value!r}: expected an integer >= 1")
    return value


class Match(NamedTuple):
    """Longest cached prefix: `blocks` int32 [num_tokens / block_size]. Holds nothing: retain before the next call."""

    blocks: np.ndarray
    num_tokens: int


class Index(ABC):
    """What a pool asks of an index.

    log: told of everything that enters, leaves or moves.  moves_blocks: whether `coldest` offers any.  ranks_blocks:
    whether `uses` and `next_out` tell what is used often, and what goes next.  counts_apart: set by who asks for
    `uses`, before anything is cached; else what continues a prefix may be given the uses of that.
    """

    log: EventLog = NobodyFollows()
    moves_blocks = False
    ranks_blocks = False
    counts_apart = False

    @abstractmethod
    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        """The longest cached prefix of tokens[:limit] (int32 [n]), and marks it used."""

    @abstractmethod
    def peek(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        """What `match` would find, marking nothing used."""

    @abstractmethod
    def insert(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Maps a prefix of whole blocks to `blocks` and returns the canonical blocks, int32 [n].

        Where the prefix was cached already the old blocks stay and are the canonical ones; the rest are the caller's,
        and the caller retains those for the index.
        """

    @abstractmethod
    def delete(self, tokens: np.ndarray) -> np.ndarray:
        """Forgets the prompt `tokens`, what continues it, and the part of its prefix that serves no other prompt.

        Returns those blocks, int32 [n]; a block that a request still holds leaves the index like the others. An index
        does not remember what was inserted, so the rest of a prompt that is cached in part counts as evicted: the part
        goes, even if it was inserted as a shorter prompt, unless another prompt continues it. Does nothing for a prompt
        of which nothing is cached.
        """

    @abstractmethod
    def evict(self, num_blocks: int, medium: Medium | None = None) -> np.ndarray:
        """Removes up to `num_blocks` blocks that nobody else holds, in eviction order; returns them, int32 [n].

        medium: take none that lie elsewhere, nor any that they continue; None: wherever they lie.
        """

    def coldest(self, num_blocks: int) -> np.ndarray:
        """Up to `num_blocks` blocks in HBM that nobody else holds, in eviction order, to be moved to DRAM; int32 [n].

        They need not be leaves, since nothing is lost. The caller must `repoint` them.
        """
        return _NO_BLOCKS

    def repoint(self, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        """The contents of cached `blocks` lie in `moved_to` now; both int32 [n]."""
        assert not len(blocks), f"{type(self).__name__} cannot follow blocks that move"

    def uses(self, tokens: np.ndarray) -> np.ndarray:
        """How often each block of the longest cached prefix was used (see eviction.Evictable), int64 [n]; never more
        than the block before it. Marks nothing used.
        """
        return np.ones(len(self.peek(tokens).blocks), dtype=np.int64)

    def next_out(self, num_blocks: int, known: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Of what `evict(num_blocks)` would take, the first that is not in `known`, and all that it continues and that
        ends with it: tokens, int32 [n * block_size], and their blocks, int32 [n]. Changes nothing.

        known: bool [all blocks]; if it has a block, it has those before it.
        """
        return None

    @abstractmethod
    def clear(self) -> np.ndarray:
        """Forgets everything; returns the blocks, int32 [n]."""

    @abstractmethod
    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every maximal cached path, those first that would go last: int32 [n * block_size] tokens, their blocks."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks in the index."""


class NullIndex(Index):
    """Caching off: remembers nothing. The baseline of every caching ablation."""

    def __init__(self, block_size: int, refcounts: np.ndarray, num_hbm_blocks: int | None = None) -> None:
        del block_size, refcounts, num_hbm_blocks

    def match(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        return Match(_NO_BLOCKS, 0)

    def peek(self, tokens: np.ndarray, limit: int | None = None) -> Match:
        return Match(_NO_BLOCKS, 0)

    def insert(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        return blocks

    def delete(self, tokens: np.ndarray) -> np.ndarray:
        return _NO_BLOCKS

    def evict(self, num_blocks: int, medium: Medium | None = None) -> np.ndarray:
        return _NO_BLOCKS

    def clear(self) -> np.ndarray:
        return _NO_BLOCKS

    def iter_prefixes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return iter(())

    @property
    def num_blocks(self) -> int:
        return 0
