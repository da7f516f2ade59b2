"""Outgoing: a ticket as its sender has it. protocol.py says what becomes of it, sending.py does it."""

from dataclasses import dataclass, field

import numpy as np

from memserve.kvcache.allocator import Holder
from memserve.kvcache.protocol import SenderState
from memserve.kvcache.ticket import Ticket, TransferCounts
from memserve.messages import Ask, PoolSize
from memserve.transfer.transport import Arrived


@dataclass
class Outgoing:
    """ready, posted: int64 [L], leading blocks of each layer that are final, and that were handed to the transport.

    targets: addresses at the receiver, int64, of the last blocks; it holds the first ones already.
    target_pool: the receiver's.  counts: of all that was sent to this peer.  begun_ns, ended_ns: of its first and last
    move that are over.  is_told: nothing more is to be said to the receiver than `private`.  early: leading blocks that
    were marked before the grant, their layers, and since when they are final, which in virtual time is yet to come.
    """

    ticket: Ticket
    peer: int
    ask: Ask
    blocks: np.ndarray
    ready: np.ndarray
    posted: np.ndarray
    deadline_ns: int
    retry_ns: int
    counts: TransferCounts
    state: SenderState = SenderState.ASKED
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    target_pool: PoolSize = field(default_factory=lambda: PoolSize(0, 0))
    num_held: int = 0
    num_parts: int = 0
    num_under_way: int = 0
    num_bytes: int = 0
    begun_ns: int | None = None
    ended_ns: int = 0
    is_told: bool = True
    early: dict[int, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.private = self.ask.private
        self.holder: Holder = ("transfer", *self.ticket.ticket_id)

    @property
    def first_block(self) -> int:
        """The first block that the receiver lacks."""
        return len(self.blocks) - len(self.targets)

    @property
    def next_time_ns(self) -> int | None:
        """When time alone does something to it."""
        match self.state:
            case SenderState.DRAINING | SenderState.ENDED:
                return None
            case SenderState.SENDING:
                return self.deadline_ns
            case _:
                return min(self.deadline_ns, self.retry_ns)

    @property
    def num_tokens(self) -> int:
        """Valid tokens that the receiver lacked."""
        return len(self.ask.tokens) // 4 - self.num_held

    @property
    def is_closing(self) -> bool:
        """Whether nothing more of it will be posted: it ends as soon as what is on the wire has arrived."""
        return self.state is SenderState.DRAINING or bool((self.posted == len(self.blocks)).all())

    def mark(self, num_blocks: int, layer: int) -> None:
        """The first `num_blocks` blocks of a layer are final."""
        self.ready[layer] = max(int(self.ready[layer]), num_blocks)

    def arrived(self, arrived: Arrived) -> None:
        """One of the moves is over."""
        self.num_under_way -= 1
        self.begun_ns = arrived.begun_ns if self.begun_ns is None else min(self.begun_ns, arrived.begun_ns)
        self.ended_ns = max(self.ended_ns, arrived.ended_ns)
