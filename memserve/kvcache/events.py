"""Index events: what entered and left an index, for a follower elsewhere (index_follower.py). Knows no index.

    # an event's path: blocks [0, first_block) were there before | [first_block, end_block) the event is about

An event's life: an index reports a change to its log -> the log numbers it -> drained -> sent, perhaps twice or never
-> applied by a follower in the order of the numbers. Nobody follows by default: a log that forgets gets the reports.
"""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np

from memserve.kvcache.address import Medium

MAX_UNDRAINED = 1 << 16  # events; of older ones the follower sees a gap, and asks for a snapshot

_SAME = -1

Blocks = np.ndarray | Sequence[int]


class EventKind(StrEnum):
    INSERTED = "inserted"
    REMOVED = "removed"
    MOVED = "moved"
    CLEARED = "cleared"


class IndexEvent(msgspec.Struct, frozen=True):
    """A change of one index, number `seq` since it was followed (from 1).

    path: tokens from the root to `end_block`, as little-endian int32 bytes.  medium: where the blocks [first_block,
    end_block) of that path lie since the event; for REMOVED, where they lay. Nothing continues a path that is removed.
    """

    seq: int
    kind: EventKind
    path: bytes
    first_block: int
    end_block: int
    medium: Medium

    @property
    def tokens(self) -> np.ndarray:
        """The path as tokens, int32 [n]."""
        return np.frombuffer(self.path, dtype="<i4")


class IndexSnapshot(msgspec.Struct, frozen=True):
    """What an index held after event `seq`: events (all of them INSERTED) that rebuild it from nothing."""

    seq: int
    events: list[IndexEvent]


class Located(Protocol):
    """A node of an index."""

    def path(self) -> bytes:
        """The tokens from the root to the node's end, as int32 bytes."""


class EventLog(ABC):
    """What an index reports to. `blocks`, int32 [n], are always the last n of the node's path."""

    @abstractmethod
    def inserted(self, node: Located, blocks: Blocks) -> None:
        """Blocks are cached now."""

    @abstractmethod
    def removed(self, node: Located, blocks: Blocks) -> None:
        """Blocks are about to leave; what continues them has left."""

    @abstractmethod
    def moved(self, node: Located, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        """The contents of `blocks` lie in `moved_to` now; some may be where they were."""

    @abstractmethod
    def cleared(self) -> None:
        """Everything left."""


class NobodyFollows(EventLog):
    """Forgets every report, and looks up no path."""

    def inserted(self, node: Located, blocks: Blocks) -> None:
        """Nobody is told."""

    def removed(self, node: Located, blocks: Blocks) -> None:
        """Nobody is told."""

    def moved(self, node: Located, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        """Nobody is told."""

    def cleared(self) -> None:
        """Nobody is told."""


class EventRecorder(EventLog):
    """Numbers events and keeps them until they are drained. num_hbm_blocks: blocks from this number on lie in DRAM.

    A path that leaves block by block before anybody drains is one event: each names the whole path.
    """

    def __init__(self, block_size: int, num_hbm_blocks: int) -> None:
        self._block_bytes = 4 * block_size
        self._num_hbm_blocks = num_hbm_blocks
        self._seq = 0
        self._told_seq = 0  # the last event that a snapshot covers
        self._events: deque[IndexEvent] = deque(maxlen=MAX_UNDRAINED)

    def drain(self) -> list[IndexEvent]:
        """The events since the last call, oldest first."""
        events = list(self._events)
        self._events.clear()
        return events

    def snapshot(self, prefixes: Iterable[tuple[np.ndarray, np.ndarray]]) -> IndexSnapshot:
        """The state after the last event, from the index's `iter_prefixes`."""
        events = [
            self._event(EventKind.INSERTED, tokens.tobytes(), start, end, medium)
            for tokens, blocks in prefixes
            for start, end, medium in _runs(self._media(blocks))
        ]
        self._told_seq = self._seq
        return IndexSnapshot(self._seq, events)

    def inserted(self, node: Located, blocks: Blocks) -> None:
        self._note(EventKind.INSERTED, node.path(), _runs(self._media(blocks)), len(blocks))

    def removed(self, node: Located, blocks: Blocks) -> None:
        path, deepest_first = node.path(), list(_runs(self._media(blocks)))[::-1]
        if len(deepest_first) == 1 and self._continues(path, deepest_first[0][2]):
            last = self._events.pop()
            first_block = len(path) // self._block_bytes - len(blocks)
            self._events.append(msgspec.structs.replace(last, first_block=first_block))
        else:
            self._note(EventKind.REMOVED, path, deepest_first, len(blocks))

    def _continues(self, path: bytes, medium: int) -> bool:
        """Whether the last event is of what followed `path`, left the same medium, and nobody has heard of it yet."""
        if not self._events or self._events[-1].seq == self._told_seq:
            return False
        last = self._events[-1]
        return (
            last.kind is EventKind.REMOVED
            and last.medium == medium
            and last.first_block * self._block_bytes == len(path)
            and last.path.startswith(path)
        )

    def moved(self, node: Located, blocks: np.ndarray, moved_to: np.ndarray) -> None:
        before, after = self._media(blocks), self._media(moved_to)
        changed = _runs(np.where(before == after, _SAME, after))
        self._note(EventKind.MOVED, node.path(), (run for run in changed if run[2] != _SAME), len(blocks))

    def cleared(self) -> None:
        self._note(EventKind.CLEARED, b"", [(0, 0, Medium.HBM)], 0)

    def _media(self, blocks: Blocks) -> np.ndarray:
        """int8 [n]: the medium of each block."""
        return (np.asarray(blocks) >= self._num_hbm_blocks).astype(np.int8)

    def _note(self, kind: EventKind, path: bytes, runs: Iterable[tuple[int, int, int]], num_blocks: int) -> None:
        """One event for each run of the last `num_blocks` blocks of a path."""
        before = len(path) // self._block_bytes - num_blocks
        for start, end, medium in runs:
            self._seq += 1
            self._events.append(self._event(kind, path, before + start, before + end, medium))

    def _event(self, kind: EventKind, path: bytes, first: int, end: int, medium: int) -> IndexEvent:
        return IndexEvent(self._seq, kind, path[: end * self._block_bytes], first, end, Medium(medium))


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(start, end, value) of each run of equal values."""
    if len(values):
        borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        for start, end in itertools.pairwise(borders):
            yield start, end, int(values[start])
