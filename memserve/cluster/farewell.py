"""Farewell: how the members of a cluster part where each was started by itself, and the store is rank 0's.

member   leaves, and says so in the store, after its last message; it ends if the store does not answer before
rank 0   waits for those, a moment; whoever is started again meanwhile learns that all is over
"""

import logging
from abc import ABC, abstractmethod

from torch.distributed import DistError

from memserve.clock import monotonic_ns, to_ns
from memserve.cluster.launch import Place, process_of
from memserve.cluster.lifeline import StoreLine
from memserve.cluster.mailbox import Mailbox, births_of
from memserve.cluster.node_messages import Idle, Leave, Restarted, Stop
from memserve.cluster.roster import CONTROLLER
from memserve.cluster.watch import watched
from memserve.config.schema import RunConfig

_MOMENT_S = 10.0
_WAIT_MS = 100
_log = logging.getLogger("memserve")


class Farewell(ABC):
    """Of one process. Made when it has come."""

    @staticmethod
    def of(cfg: RunConfig, place: Place, mailbox: Mailbox) -> "Farewell":
        if cfg.cluster.store is None:
            return NoFarewell()
        return LastToLeave(place, mailbox) if place.rank == CONTROLLER else Guest(place)

    @abstractmethod
    def say(self) -> None:
        """This process has done its part."""


class NoFarewell(Farewell):
    """The store is torchrun's."""

    def say(self) -> None:
        """Nobody waits for it."""


class Guest(Farewell):
    """A member's."""

    def __init__(self, place: Place) -> None:
        self._place, self._line = place, StoreLine(place.store)

    def say(self) -> None:
        """Also where rank 0 has gone first: then nobody waits, and what ended this process is what it says."""
        self._line.cut()
        try:
            self._place.store.set(f"left/{self._place.rank}/{self._place.birth}", "")
        except DistError as error:
            _log.error("rank 0 is gone: %s", error)


class LastToLeave(Farewell):
    """Rank 0's."""

    def __init__(self, place: Place, mailbox: Mailbox) -> None:
        self._place, self._mailbox = place, mailbox

    def say(self) -> None:
        until_ns = monotonic_ns() + to_ns(_MOMENT_S)
        while not all(map(self._has_left, range(CONTROLLER + 1, self._place.world_size))):
            if monotonic_ns() > until_ns:
                return
            for rank, message in self._mailbox.receive(_WAIT_MS):
                if isinstance(message, Restarted | Idle):
                    self._mailbox.reconnect(rank)
                    self._mailbox.send(rank, Stop(0))
                    self._mailbox.send(rank, Leave())

    def _has_left(self, rank: int) -> bool:
        """Whether a rank's latest process has said so, or is gone; or none ever came."""
        store = self._place.store
        num_births = store.add(births_of(rank), 0)
        if not num_births or store.check([f"left/{rank}/{num_births - 1}"]):
            return True
        process = watched(process_of(store, rank))
        return process is not None and process.is_gone
