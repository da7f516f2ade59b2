"""Spare: a rank that is no instance: it waits to become one, or for the run to end.

Idle -> Become: an instance -> drained, Left -> Idle -> ... -> Stop, Leave
"""

from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.node_messages import (
    BEAT_S,
    Alive,
    Become,
    Idle,
    Leave,
    LeftEarly,
    Restarted,
    Resume,
    Stop,
    this_process,
)
from memserve.cluster.roster import CONTROLLER

_WAIT_MS = 1000


class Spare:
    """mailbox: of a rank.  run: its number.  early: what came after the last `Become`."""

    def __init__(self, mailbox: Mailbox, run: int) -> None:
        self._mailbox, self._run = mailbox, run
        self.early: list[tuple[int, AnyMessage]] = []

    def wait(self) -> Become | None:
        """What this rank is to be; None when the run is over. Raises LeftEarly if rank 0 ends before it is.

        What is left of an instance that this rank was, messages for it, is dropped.
        """
        self._mailbox.send(CONTROLLER, Idle(this_process(), self._run))
        self._mailbox.beat(CONTROLLER, Alive(), BEAT_S)
        is_over = False
        while True:
            received = self._mailbox.receive(_WAIT_MS)
            for number, (_, message) in enumerate(received):
                if isinstance(message, Become):
                    self.early = received[number + 1 :]
                    return message
                if isinstance(message, Leave):
                    if not is_over:
                        raise LeftEarly("rank 0 ended before the run did")
                    return None  # nothing of the next run comes before this rank has said that it is there
                is_over = is_over or isinstance(message, Stop)


def resumed_run(mailbox: Mailbox) -> int | None:
    """For a process in the place of one that is gone: the number of the run that it has come into; None for none any
    more.
    """
    mailbox.send(CONTROLLER, Restarted(this_process()))
    while True:
        for _, message in mailbox.receive(_WAIT_MS):
            if isinstance(message, Resume):
                return message.run
            if isinstance(message, Leave):
                return None
