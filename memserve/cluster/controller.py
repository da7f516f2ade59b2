"""Controller: rank 0 in one run: the client, the global scheduler, and the watch over the instances' processes."""

import logging
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from memserve.clock import monotonic_ns, to_ns, to_s
from memserve.cluster.build import Engine
from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.manager import ClusterManager
from memserve.cluster.node_messages import (
    Alive,
    Broken,
    Changed,
    Gone,
    Held,
    Leave,
    LeftAlone,
    Ping,
    Pong,
    Ready,
    Start,
    Stop,
    Stopped,
    WantSnapshot,
)
from memserve.cluster.result import Result
from memserve.cluster.roster import Roster
from memserve.cluster.summary import Summary, activity_of, report_of
from memserve.cluster.wiring import build_global_scheduler
from memserve.config.schema import RunConfig
from memserve.messages import Finished, Message, Tokens
from memserve.metrics.progress import Progress
from memserve.request import Role
from memserve.sched.global_scheduler import CLIENT
from memserve.sched.scaling import NoScaling
from memserve.transfer.liveness import Watched
from memserve.transfer.shared_memory import host_id
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session

READY_S = 900.0  # most time for every instance to load its model
STOP_S = 30.0  # beyond the transfers' own deadline
_WATCH_NS = 100_000_000  # between looks at the processes
_log = logging.getLogger("memserve")


class InstanceFailed(RuntimeError):
    """An instance's process has ended by an error, or does not answer."""


class Controller:
    """Rank 0 in one run: the client, the global scheduler, and the watch over the instances' processes."""

    def __init__(
        self,
        cfg: RunConfig,
        roles: Sequence[tuple[str, Role]],
        roster: Roster,
        mailbox: Mailbox,
        engine: Engine,
        sessions: Sequence[Session],
        concurrency: int | None,
    ) -> None:
        self._mailbox, self._labels = mailbox, [label for label, _ in roles]
        self._roster = roster
        self._scheduler = build_global_scheduler(cfg, roles, np.random.default_rng(cfg.seed))
        self._members = ClusterManager(roles, NoScaling(), self._scheduler)
        self._client = SessionPlayer(sessions, engine.max_context, concurrency)
        self._stop_s = cfg.transfer.deadline_s + STOP_S
        self._processes: dict[int, list[Watched | None]] = {}  # of its ranks; None: on another host, without proof
        self._summaries: dict[int, Summary] = {}
        self._gone: set[int] = set()  # there is proof, for every rank
        self._broken: set[int] = set()  # a rank is gone; those that are left may still write
        self._silent: set[int] = set()  # no proof that they are gone: they are routed around, and may come back
        self._heard_ns: dict[int, int] = {}  # by rank; since the start, when all were there
        self._silence_ns = to_ns(cfg.cluster.silence_s)
        self._epoch_ns = 0
        self._watched_ns = 0

    def run(self, progress: Progress | None) -> Result:
        """Until every request has ended and every instance has stopped. Raises InstanceFailed when one breaks."""
        try:
            self._until(lambda: len(self._processes) == len(self._labels), READY_S, "get ready")
            self._epoch_ns = monotonic_ns()
            self._heard_ns = dict.fromkeys(range(1, self._roster.world_size), self._epoch_ns)
            self._tell_all(Start(self._epoch_ns))
            while not (self._client.done and not self._scheduler.num_unfinished):
                self._turn(progress)
            end_ns = self._now_ns()
            self._tell_all(Stop(end_ns))
            self._until(
                lambda: self._summaries.keys() >= self._left() - self._silent - self._broken, self._stop_s, "stop"
            )
        finally:
            self._tell_all(Leave())
        left = [self._summaries[i] for i in sorted(self._summaries)]
        timelines = list(self._scheduler.timelines.values())
        report = report_of(self._scheduler, self._members, left, self._client.counts, to_s(end_ns))
        occupancy = [sample for summary in left for sample in summary.occupancy]
        threads = {summary.stats.id: summary.num_threads for summary in left}
        return Result(report, timelines, occupancy, activity_of(left, self._labels), threads, self._missing())

    def _missing(self) -> dict[str, str]:
        """The instances that have not stopped, and why."""
        lost = self._gone | self._broken
        return {
            label: "gone" if instance in lost else "silent"
            for instance, label in enumerate(self._labels)
            if instance not in self._summaries
        }

    def _left(self) -> set[int]:
        return set(range(len(self._labels))) - self._gone

    def _now_ns(self) -> int:
        return monotonic_ns() - self._epoch_ns

    def _until(self, is_done: Callable[[], bool], limit_s: float, what: str) -> None:
        began_ns = monotonic_ns()
        while not is_done():
            self._receive(100)
            self._watch()
            if to_s(monotonic_ns() - began_ns) > limit_s:
                late = self._left() - (self._summaries.keys() if self._summaries else self._processes.keys())
                raise InstanceFailed(f"instances {sorted(late)} did not {what} within {limit_s:.0f} s")

    def _turn(self, progress: Progress | None) -> None:
        next_ns = self._client.next_time_ns()
        wait_ns = _WATCH_NS if next_ns is None else min(max(next_ns - self._now_ns(), 0), _WATCH_NS)
        self._receive(-(-wait_ns // 1_000_000))
        for submit in self._client.poll(self._now_ns()):
            self._scheduler.receive(submit, self._now_ns())
        self._watch()
        self._deliver()
        if progress is not None:
            counts = self._client.counts
            progress.update(counts.turns_ended, counts.num_turns, to_s(self._now_ns()))

    def _receive(self, timeout_ms: int) -> None:
        for sender, message in self._mailbox.receive(timeout_ms):
            self._take(sender, message)
        self._deliver()

    def _take(self, rank: int, message: AnyMessage) -> None:
        self._heard(rank)
        instance = self._roster.instance(rank)
        match message:
            case Alive():
                pass
            case Ping():
                self._mailbox.send(rank, Pong(message.sent_ns, monotonic_ns()))
            case Ready():
                self._processes[instance] = [Watched(p.pid) if p.host == host_id() else None for p in message.processes]
            case Stopped():
                self._summaries[instance] = msgspec.msgpack.decode(message.summary, type=Summary)
            case Changed():
                if not self._scheduler.groups.index_changed(self._labels[instance], message.events):
                    self._mailbox.send(rank, WantSnapshot())
            case Held():
                self._scheduler.groups.index_snapshot(self._labels[instance], message.snapshot)
            case Broken():
                raise InstanceFailed(f"{self._labels[instance]} failed: {message.detail}")
            case LeftAlone():
                if not self._epoch_ns:
                    raise InstanceFailed(f"{self._labels[instance]} failed: {message.detail}")
                self._break(instance)
            case _ if isinstance(message, Message):
                if instance not in self._gone | self._broken:
                    self._scheduler.receive(message, self._now_ns())
            case _:
                raise TypeError(f"the global scheduler takes no {type(message).__name__}")

    def _heard(self, rank: int) -> None:
        self._heard_ns[rank] = monotonic_ns()
        instance = self._roster.instance(rank)
        if instance in self._silent - self._broken and not self._is_silent(instance):
            _log.warning("%s is back", self._labels[instance])
            self._silent.discard(instance)
            self._scheduler.instance_back(self._labels[instance])

    def _deliver(self) -> None:
        """What the global scheduler has to say; instances take it in order."""
        for destination, message in self._scheduler.drain_outbox():
            if destination == CLIENT:
                assert isinstance(message, Tokens | Finished)
                self._client.receive(message, self._now_ns())
            elif (instance := self._labels.index(destination)) not in self._gone:
                self._mailbox.send(self._roster.leader(instance), message)

    def _watch(self) -> None:
        """Looks now and then whether every process is still there."""
        if monotonic_ns() - self._watched_ns < _WATCH_NS:
            return
        self._watched_ns = monotonic_ns()
        for instance in sorted(self._processes.keys() - self._gone):
            ended = [watched is not None and watched.is_gone for watched in self._processes[instance]]
            if all(ended):
                self._lose(instance)
            elif any(ended):
                self._break(instance)
        for instance in sorted(self._left() - self._broken - self._silent):
            if self._epoch_ns and self._is_silent(instance):
                _log.warning("%s is silent", self._labels[instance])
                self._silent.add(instance)
                self._scheduler.instance_gone(self._labels[instance], self._now_ns())
                self._deliver()

    def _is_silent(self, instance: int) -> bool:
        """Whether any of its ranks has not been heard for too long, while all run."""
        heard_ns = min(self._heard_ns[rank] for rank in self._roster.ranks(instance))
        return monotonic_ns() - heard_ns > self._silence_ns

    def _break(self, instance: int) -> None:
        """One of its ranks is gone: it serves nobody any more, and is to end. Nobody frees what it may still write."""
        if instance in self._broken:
            return
        _log.warning("%s has lost a rank", self._labels[instance])
        self._broken.add(instance)
        self._mailbox.send(self._roster.leader(instance), Leave())
        self._without(instance)

    def _lose(self, instance: int) -> None:
        _log.warning("%s is gone", self._labels[instance])
        self._gone.add(instance)
        self._tell_all(Gone(instance))
        self._without(instance)

    def _without(self, instance: int) -> None:
        """What it had is served elsewhere."""
        if not self._left() - self._broken:
            raise InstanceFailed("every instance is gone")
        self._scheduler.instance_gone(self._labels[instance], self._now_ns())
        self._deliver()

    def _tell_all(self, message: AnyMessage) -> None:
        for instance in self._left():
            self._mailbox.send(self._roster.leader(instance), message)
