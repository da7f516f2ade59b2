"""Ticket: something under way between two media or two instances, and how it ended. Knows nobody who works on it.

    OPEN -> DONE | FAILED

A ticket is returned at once; `MemPool.poll` returns it again when it has ended. Until then the blocks at both of its
ends are held by it.
"""

import enum
from dataclasses import dataclass

import numpy as np


class TicketState(enum.StrEnum):
    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


@dataclass(eq=False)
class Ticket:
    """ticket_id: (incarnation of the instance that asked, its number there). addrs: int64 [n], where the data lies once
    it is DONE. reason: why it FAILED, else "".
    """

    ticket_id: tuple[int, int]
    addrs: np.ndarray
    state: TicketState = TicketState.OPEN
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.state is not TicketState.OPEN
