"""Incoming: a ticket as its receiver has it. protocol.py says what becomes of it, receiving.py does it."""

from dataclasses import dataclass, field

import numpy as np

from memserve.kvcache.allocator import Holder
from memserve.kvcache.protocol import ReceiverState
from memserve.messages import Ask, unpack_tokens

TicketId = tuple[int, int]
NEVER_NS = int(np.iinfo(np.int64).max)


@dataclass
class Incoming:
    """place: among the Asks, in the order in which they came.  level: those of a smaller one are given room first.
    blocks: int32 [n] once granted, those that were held first.  read_ns: when the Ask was read.  arrived_ns: as `Done`
    says.
    """

    ask: Ask
    place: int
    level: float
    read_ns: int
    state: ReceiverState = ReceiverState.NONE
    blocks: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    num_held: int = 0
    granted_ns: int = 0
    arrived_ns: int = 0
    deadline_ns: int = NEVER_NS
    reason: str = ""
    private: bytes = b""

    def __post_init__(self) -> None:
        self.holder: Holder = ("transfer", *self.ask.ticket)

    @property
    def next_time_ns(self) -> int | None:
        """When time alone does something to it."""
        return None if self.state is ReceiverState.ENDED or self.deadline_ns == NEVER_NS else self.deadline_ns

    @property
    def tokens(self) -> np.ndarray:
        return unpack_tokens(self.ask.tokens)
