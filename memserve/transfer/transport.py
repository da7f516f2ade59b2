"""Transport: moves rows of bytes from one endpoint's memory to another's. Knows endpoints by number, and no KV.

An endpoint attaches its memories once. Whoever writes posts moves and polls for those that have arrived whole; moves
between two endpoints arrive in the order in which they were ready. A posted move is always completed, unless one of its
ends is gone.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

MoveId = tuple[int, int, int]  # (endpoint that posts it, ticket, part of the ticket)


@dataclass(frozen=True)
class Move:
    """Rows of one memory to rows of another, seen as [num_rows, row_bytes].

    source, target: (endpoint, number of its memory).  source_rows, target_rows: int64 [n].
    call_starts: int64 [num_calls], the row with which each network call begins.  packed: gathered into one buffer
    before the call and scattered after it.
    num_alike: every row of these stands for so many, `source_step` and `target_step` rows apart: one each token of a
    region, of which a part of the heads moves.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    row_bytes: int
    source_rows: np.ndarray
    target_rows: np.ndarray
    call_starts: np.ndarray
    packed: bool = False
    num_alike: int = 1
    source_step: int = 1
    target_step: int = 1

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * len(self.source_rows) * self.num_alike

    @property
    def num_calls(self) -> int:
        return len(self.call_starts)

    def expanded(self) -> "Move":
        """The same with every row named, as who copies it needs."""
        if self.num_alike == 1:
            return self
        each = np.arange(self.num_alike)
        source_rows, target_rows = (
            (rows[:, None] + each * step).ravel()
            for rows, step in ((self.source_rows, self.source_step), (self.target_rows, self.target_step))
        )
        starts = self.call_starts * self.num_alike
        return replace(self, source_rows=source_rows, target_rows=target_rows, call_starts=starts, num_alike=1)


@dataclass(frozen=True)
class Arrived:
    """A move that is over: its bytes are all in place, or its target was detached and nothing more is written there.

    begun_ns, ended_ns: when it was begun and ended on the wire, on the clock of whoever polls.
    """

    move_id: MoveId
    begun_ns: int
    ended_ns: int

    def later_by(self, offset_ns: int) -> "Arrived":
        """The same on a clock that is ahead by so much."""
        return Arrived(self.move_id, self.begun_ns + offset_ns, self.ended_ns + offset_ns)


class Transport(ABC):
    """One way to move bytes. A class says where it works:

    within_process: between endpoints of one process, in virtual time; by default between processes.  within_host: these
    are on one machine.  needs_gpu: endpoints' memories in HBM are a GPU's.

    offset_ns: by how much the clock of whoever polls is ahead of this machine's, which moves are timed by; none in
    virtual time.
    """

    within_process = False
    within_host = False
    needs_gpu = False
    offset_ns = 0

    @abstractmethod
    def attach(self, endpoint: int, memories: Sequence[torch.Tensor | None]) -> None:
        """Makes an endpoint's memories (contiguous tensors; None: there is nothing behind the rows) known."""

    def prepare(self, endpoints: Sequence[int], limit_s: float) -> None:  # noqa: B027 # most have nothing to do
        """Does before anything is posted what the first move to each of these would take beside its bytes: of those
        that are attached within limit_s. Nobody need call it.
        """

    @abstractmethod
    def knows(self, endpoint: int) -> bool:
        """Whether an endpoint is attached, as far as this process can tell."""

    @abstractmethod
    def detach(self, endpoint: int) -> None:
        """Forgets an endpoint that is gone: what it had posted stops, what others write to it reaches nothing.

        Nothing more is copied to or from its memories once this returns. What was posted to it counts as arrived.
        """

    @abstractmethod
    def post(self, move_id: MoveId, move: Move, ready_ns: int) -> None:
        """Begins a move as soon as the source is ready. The caller keeps both ends' rows until it has arrived.

        `move.expanded()` names all of them.
        """

    @abstractmethod
    def poll(self, endpoint: int, now_ns: int) -> list[Arrived]:
        """The moves posted by `endpoint` that have arrived since the last call, in order."""

    @abstractmethod
    def next_time_ns(self) -> int | None:
        """When to poll next, on a virtual clock: nothing arrives before; None when nothing is under way."""

    @abstractmethod
    def close(self) -> None:
        """Ends everything: what is under way stops, and nothing can be posted any more."""
