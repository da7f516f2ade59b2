"""Ticket: something under way between two media or two instances, and how it ended. Knows nobody who works on it.

    OPEN -> DONE | FAILED

A ticket is returned at once; `MemPool.poll` returns it again when it has ended. Until then it holds the blocks at its
beginning; at its end what came, an Arrival, until the pool there settles that.
"""

import enum
from dataclasses import dataclass, fields

import numpy as np

from memserve.clock import LONGEST_S, to_ns
from memserve.kvcache.address import Medium
from memserve.values import require_int

LONGEST_NS = to_ns(LONGEST_S)  # a moment of the clock and one more of these stay within 64 bits


class TicketState(enum.StrEnum):
    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


@dataclass(eq=False)
class Ticket:
    """ticket_id: (incarnation of the instance that asked, its number there). addrs: int64 [n], where the data lies once
    it is DONE, of blocks that were moved: none for what a receiver's index held already; of a swap_in that FAILED,
    those that are still held.  reason: why it FAILED, else "".  refused: because the receiver said so at once.
    """

    ticket_id: tuple[int, int]
    addrs: np.ndarray
    state: TicketState = TicketState.OPEN
    reason: str = ""
    refused: bool = False

    @property
    def ended(self) -> bool:
        return self.state is not TicketState.OPEN


@dataclass(frozen=True)
class Timeouts:
    """deadline_ns: from the grant to the end of a ticket.  patience_ns: from the Ask to the grant.  retry_ns: between
    repeats of a message that was not answered. Raises ValueError for what is no integer from 1 to LONGEST_NS.
    """

    deadline_ns: int
    patience_ns: int
    retry_ns: int

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, require_int(f.name, getattr(self, f.name), 1, LONGEST_NS))


@dataclass(frozen=True)
class GrantLimits:
    """How far a receiver goes. headroom_blocks: HBM blocks that a grant leaves free for what runs there.

    max_best_effort: tickets that may be under way to it when one at best effort is asked for; None: any number. Of many
    that share its port each holds its sender's blocks for as long as all of them take. Raises ValueError for what is
    no integer >= 1.
    """

    headroom_blocks: int = 0
    max_best_effort: int | None = None

    def __post_init__(self) -> None:
        if self.max_best_effort is not None:
            require_int("max_best_effort", self.max_best_effort, 1)


@dataclass(frozen=True)
class TransferOptions:
    """What the receiver does with the blocks.

    on_demand: it allocates when asked; without, only addresses that were reserved before are written.  insert: it
    indexes the whole ones.  medium: where it allocates.  best_effort: it declines instead of waiting for room.
    pinned: they stay held under the ticket until somebody frees them.
    """

    on_demand: bool = True
    insert: bool = False
    medium: Medium = Medium.HBM
    best_effort: bool = False
    pinned: bool = False


PLAIN = TransferOptions()


@dataclass
class TransferCounts:
    """What was sent. tokens: valid ones, of tickets that did not fail; all else is of those that failed, too.
    calls: network calls.  bytes, calls: of all ranks of an instance.  bytes_in_vain: of tickets that failed.
    elapsed_ns: on the wire, of each move, added up, also of moves that were there at the same time.

    transfers: as the paper counts them (Fig. 5), of KV that had to move: 2L for each chunk by layer, else 1 a ticket.
    declined: refused for lack of room, best effort only.  overtaken: what it was sent for had happened already.
    failed: ended without being inserted, for another reason.
    """

    tokens: int = 0
    bytes: int = 0
    bytes_in_vain: int = 0
    transfers: int = 0
    calls: int = 0
    elapsed_ns: int = 0
    declined: int = 0
    overtaken: int = 0
    failed: int = 0

    def __add__(self, other: "TransferCounts") -> "TransferCounts":
        return TransferCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Sent:
    """A ticket of which something was sent. begun_ns, ended_ns: of its first and last move.  num_tokens: valid ones,
    0 if it failed.
    """

    ticket_id: tuple[int, int]
    peer: int
    begun_ns: int
    ended_ns: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class Arrival:
    """A ticket whose KV is all here. tokens: int32 [t].  blocks: int32 [n], held under the ticket until it is settled.
    num_held: tokens that were here before.  read_ns, granted_ns: when the Ask was read here, and granted.  arrived_ns:
    when the last byte was here.  received_ns: when `Done` was read, and the KV published. Times in ns.
    """

    ticket_id: tuple[int, int]
    tokens: np.ndarray
    blocks: np.ndarray
    num_held: int
    private: bytes
    read_ns: int
    granted_ns: int
    arrived_ns: int
    received_ns: int
