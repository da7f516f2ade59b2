"""Watch: whether the processes of a cluster are there. Knows ranks, instances and proof; no scheduler, no message.

here        -> silent    nothing was heard of it for silence_s: no proof that it is gone, and it may come back
            -> broken    one of its ranks is gone; those that are left may still write
            -> gone      all of its ranks are
"""

import enum
from collections.abc import Sequence

from memserve.clock import monotonic_ns, to_ns
from memserve.cluster.node_messages import Process
from memserve.cluster.roster import Roster
from memserve.transfer.liveness import Watched
from memserve.transfer.shared_memory import host_id

WATCH_NS = 100_000_000  # between looks at the processes


class Finding(enum.Enum):
    GONE = "gone"
    BROKEN = "broken"
    SILENT = "silent"


class Watch:
    """roster: says which ranks an instance has.

    processes: of each instance's ranks, its leader's first; None where it is on another host: there is no proof.
    idle: of ranks that are no instance.  gone, broken, silent: instances of which that was found.  gone_idle: ranks.
    """

    def __init__(self, roster: Roster, silence_s: float) -> None:
        self.processes: dict[int, list[Watched | None]] = {}
        self.idle: dict[int, Watched | None] = {}
        self.gone, self.broken, self.silent, self.gone_idle = set[int](), set[int](), set[int](), set[int]()
        self._roster, self._silence_ns = roster, to_ns(silence_s)
        self._heard_ns: dict[int, int] = {}  # by rank; since the start, when all were there
        self._has_begun = False
        self._looked_ns = 0

    @property
    def lost(self) -> set[int]:
        """Instances that serve nobody any more."""
        return self.gone | self.broken

    def begin(self) -> None:
        """Everybody is there: from now on nobody may be silent for long."""
        self._heard_ns = dict.fromkeys(range(1, self._roster.world_size), monotonic_ns())
        self._has_begun = True

    def heard(self, rank: int) -> bool:
        """A rank gives a sign of life; True if its instance was silent and is back."""
        self._heard_ns[rank] = monotonic_ns()
        instance = self._roster.instance(rank)
        if instance is None or instance not in self.silent - self.broken or self._is_silent(instance):
            return False
        self.silent.discard(instance)
        return True

    def waits(self, rank: int, process: Process) -> None:
        """A rank is no instance, and this is its process."""
        self.idle[rank] = watched(process)
        self.gone_idle.discard(rank)

    def arrived(self, instance: int, processes: Sequence[Process]) -> None:
        """An instance tells its processes."""
        self.processes[instance] = [watched(process) for process in processes]

    def becomes(self, rank: int, instance: int) -> None:
        """An idle rank is to be an instance, with those that belong to it."""
        self.processes[instance] = [self.idle.pop(rank)]
        if self._has_begun:
            self._heard_ns |= dict.fromkeys(self._roster.ranks(instance), monotonic_ns())

    def is_replaced(self, instance: int) -> None:
        """Another process has come in the place of an instance's, which is gone therefore."""
        self.silent.discard(instance)
        self.gone.add(instance)

    def left(self, instance: int, rank: int) -> None:
        """An instance is none any more; its rank is idle."""
        self.idle[rank] = self.processes.pop(instance)[0]

    def look(self) -> list[tuple[int, Finding]]:
        """What is new of whom, now and then; idle ranks that are gone are forgotten, once the run has begun."""
        unseen_ns = monotonic_ns() - self._looked_ns
        if unseen_ns < WATCH_NS:
            return []
        self._looked_ns = now_ns = monotonic_ns()
        if unseen_ns > self._silence_ns // 2:  # who looks has stood still, or was busy, and signs of life wait unread
            self._heard_ns = {rank: min(heard_ns + unseen_ns, now_ns) for rank, heard_ns in self._heard_ns.items()}
        if self._has_begun:
            gone = {rank for rank, process in self.idle.items() if process is not None and process.is_gone}
            self.gone_idle |= gone
            self.idle = {rank: process for rank, process in self.idle.items() if rank not in gone}
        found = []
        for instance in sorted(self.processes.keys() - self.gone):
            ended = [process is not None and process.is_gone for process in self.processes[instance]]
            if all(ended):
                self.gone.add(instance)
                found.append((instance, Finding.GONE))
            elif any(ended) and instance not in self.broken:
                self.broken.add(instance)
                found.append((instance, Finding.BROKEN))
        for instance in sorted(self.processes.keys() - self.lost - self.silent):
            if self._has_begun and self._is_silent(instance):
                self.silent.add(instance)
                found.append((instance, Finding.SILENT))
        return found

    def _is_silent(self, instance: int) -> bool:
        """Whether any of its ranks has not been heard for too long, while all run."""
        heard_ns = min(self._heard_ns[rank] for rank in self._roster.ranks(instance))
        return monotonic_ns() - heard_ns > self._silence_ns


def watched(process: Process) -> Watched | None:
    """By which a process's end is seen; None on another host."""
    return Watched(process.pid, process.started) if process.host == host_id() else None
