"""Controller: rank 0 in one run: the client, the global scheduler, and the watch over the instances' processes."""

import logging
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from memserve.clock import monotonic_ns, to_s
from memserve.cluster.engine import Engine
from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.make import make
from memserve.cluster.manager import ClusterManager, Membership
from memserve.cluster.node_messages import (
    Alive,
    Broken,
    Changed,
    Held,
    Idle,
    Leave,
    Left,
    LeftAlone,
    Ping,
    Pong,
    Ready,
    Restarted,
    Resume,
    Stop,
    Stopped,
    WantSnapshot,
)
from memserve.cluster.result import Result
from memserve.cluster.roster import Roster
from memserve.cluster.summary import Summary, activity_of, report_of
from memserve.cluster.turnover import InstanceFailed, Turnover
from memserve.cluster.watch import WATCH_NS, Finding, Watch
from memserve.cluster.wiring import build_global_scheduler, build_scaling
from memserve.config.schema import RunConfig
from memserve.messages import Finished, Message, Room, Tokens
from memserve.metrics.progress import Progress
from memserve.request import Role
from memserve.sched.global_scheduler import CLIENT
from memserve.sched.scaling import Standing
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Workload

READY_S = 900.0  # most time for every instance to load its model
STOP_S = 30.0  # beyond the transfers' own deadline
_log = logging.getLogger("memserve")


class Controller:
    """Rank 0 in one run, the number of which is `run`. sessions: of the workload, with that run's seed."""

    def __init__(
        self,
        cfg: RunConfig,
        roles: Sequence[tuple[str, Role]],
        roster: Roster,
        mailbox: Mailbox,
        engine: Engine,
        sessions: Sequence[Session],
        workload: Workload,
        run: int = 0,
    ) -> None:
        self._mailbox, self._roster, self._run = mailbox, roster, run
        self._scheduler = build_global_scheduler(cfg, roles, np.random.default_rng(cfg.seed), engine.config)
        scaling = build_scaling(cfg, [role for _, role in roles])
        self._members = ClusterManager(roles, scaling, self._scheduler, make(cfg.heir))
        self._client = SessionPlayer(sessions, engine.max_context, workload.concurrency)
        self._slo, self._measure, self._workload = cfg.slo, cfg.measure, workload
        self._stop_s = cfg.transfer.deadline_s + STOP_S
        self._waits = cfg.cluster.patience_s > 0  # for instances, where none is left
        self._num_members = len(roles) + cfg.cluster.spares
        self._come_alone = cfg.cluster.store is not None  # and may be started again
        self._watch = Watch(roster, cfg.cluster.silence_s)
        self._turnover = Turnover(self._members, roster, self._watch, mailbox, len(roles))
        self._ready = set[int]()
        self._summaries: dict[int, Summary] = {}
        self._epoch_ns = 0
        self._is_over = False

    def run(self, progress: Progress | None) -> Result:
        """Until every request has ended and every instance has stopped. Raises InstanceFailed when one breaks."""
        try:
            self._until(self._are_all_here, READY_S, "get ready")
            self._epoch_ns = monotonic_ns()
            self._watch.begin()
            self._turnover.begin(self._epoch_ns)
            while not (self._client.done and not self._scheduler.num_unfinished):
                self._turn(progress)
            end_ns, self._is_over = self._now_ns(), True
            self._turnover.tell(Stop(end_ns), list(self._watch.idle))
            self._until(self._have_stopped, self._stop_s, "stop")
        finally:
            self._turnover.tell(Leave(), list(self._watch.idle))
        left = [self._summaries[i] for i in sorted(self._summaries) if self._member(i).joined_ns is not None]
        timelines = list(self._scheduler.timelines.values())
        counted = (self._client.counts, to_s(end_ns), self._slo, self._measure, self._workload)
        report = report_of(self._scheduler, self._members, left, *counted)
        occupancy = [sample for summary in left for sample in summary.occupancy]
        threads = {summary.stats.id: summary.num_threads for summary in left}
        return Result(report, timelines, occupancy, activity_of(left, self._members.labels), threads, self._missing())

    def _member(self, instance: int) -> Membership:
        return self._members.members[instance]

    def _label(self, instance: int) -> str:
        return self._member(instance).label

    def _are_all_here(self) -> bool:
        """Whether every instance can begin, and every other rank waits."""
        here = self._turnover.here
        return self._ready >= here and len(here) + len(self._watch.idle) == self._num_members

    def _have_stopped(self) -> bool:
        """Whether every instance has given its books, and every other rank waits."""
        all_wait = set(self._watch.idle) <= set(self._turnover.vacancies.ranks)
        return all_wait and self._summaries.keys() >= self._turnover.here - self._watch.silent - self._watch.lost

    def _missing(self) -> dict[str, str]:
        """The instances that have not stopped, and ranks that are no instance and gone; why."""
        return dict.fromkeys((f"spare rank {rank}" for rank in sorted(self._watch.gone_idle)), "gone") | {
            member.label: "gone" if member.incarnation in self._watch.lost else "silent"
            for member in self._members.members
            if member.joined_ns is not None and member.incarnation not in self._summaries
        }

    def _now_ns(self) -> int:
        return monotonic_ns() - self._epoch_ns if self._epoch_ns else 0

    def _until(self, is_done: Callable[[], bool], limit_s: float, what: str) -> None:
        began_ns = monotonic_ns()
        while not is_done():
            self._receive(100)
            self._look()
            if not self._is_over:
                self._turnover.fill(0)
            if to_s(monotonic_ns() - began_ns) > limit_s:
                late = self._turnover.here - (self._summaries.keys() if self._is_over else self._ready)
                named = ", ".join(self._label(instance) for instance in sorted(late)) or "those that wait to be one"
                raise InstanceFailed(f"instances did not {what} within {limit_s:.0f} s: {named}")

    def _turn(self, progress: Progress | None) -> None:
        due_ns = (self._client.next_time_ns(), self._members.next_time_ns, self._scheduler.next_time_ns)
        times_ns = [t for t in due_ns if t is not None]
        wait_ns = min(max(min(times_ns, default=WATCH_NS + self._now_ns()) - self._now_ns(), 0), WATCH_NS)
        self._receive(-(-wait_ns // 1_000_000))
        for submit in self._client.poll(self._now_ns()):
            self._scheduler.receive(submit, self._now_ns())
        self._look()
        self._turnover.proceed(self._now_ns())
        self._scheduler.poll(self._now_ns())
        self._deliver()
        if progress is not None:
            counts = self._client.counts
            progress.update(counts.turns_ended, counts.num_turns, to_s(self._now_ns()))

    def _receive(self, timeout_ms: int) -> None:
        for sender, message in self._mailbox.receive(timeout_ms):
            if isinstance(message, Restarted):
                self._take_in(sender)
                continue
            if isinstance(message, Idle):
                self._let_wait(sender, message)
                continue
            instance, is_back = self._roster.instance(sender), self._watch.heard(sender)
            if instance is None:
                self._take_from_idle(sender, message)
                continue
            if is_back:
                self._welcome_back(instance)
            self._take(sender, instance, message)
        self._deliver()

    def _take_in(self, rank: int) -> None:
        """A process is there in the place of one that is gone, of which it is proof."""
        instance = self._roster.instance(rank)
        for other in [rank] if instance is None else self._roster.ranks(instance):
            self._mailbox.reconnect(other)
        self._turnover.replace(rank)
        if instance is not None and instance in self._turnover.here:
            self._lose(instance)
        _log.warning("rank %d is there again", rank)
        self._mailbox.send(rank, Resume(self._run))

    def _let_wait(self, rank: int, message: Idle) -> None:
        """A rank that is no instance, until it is one or the run ends; one that waits in a run that is over goes on."""
        if message.run == self._run:
            self._turnover.wait(rank, message.process)
        if message.run != self._run or self._is_over:
            self._mailbox.send(rank, Stop(0))
        if message.run != self._run:
            self._mailbox.send(rank, Leave())

    def _take_from_idle(self, rank: int, message: AnyMessage) -> None:
        """Of a rank that is no instance. What it says as one that has gone comes too late."""
        if isinstance(message, Broken) and not self._goes_on_without(f"spare rank {rank}", message):
            raise InstanceFailed(f"spare rank {rank} failed: {message.detail}")

    def _goes_on_without(self, name: str, message: Broken | LeftAlone) -> bool:
        """Whether one that ends does so alone. Where each was started alone, it does: but for an error at the start."""
        if self._come_alone and (self._epoch_ns or self._run or isinstance(message, LeftAlone)):
            _log.error("%s failed: %s", name, message.detail)
            return True
        return isinstance(message, LeftAlone) and self._epoch_ns > 0

    def _take(self, rank: int, instance: int, message: AnyMessage) -> None:
        match message:
            case Alive():
                pass
            case Ping():
                self._mailbox.send(rank, Pong(message.sent_ns, monotonic_ns()))
            case Ready():
                self._watch.arrived(instance, message.processes)
                self._ready.add(instance)
                if self._epoch_ns:
                    self._turnover.welcome(instance, rank, self._now_ns(), self._epoch_ns, self._is_over)
            case Stopped():
                self._summaries[instance] = msgspec.msgpack.decode(message.summary, type=Summary)
            case Left():
                self._summaries[instance] = msgspec.msgpack.decode(message.summary, type=Summary)
                self._turnover.part_with(instance, rank, self._now_ns())
            case Changed():
                if not self._scheduler.groups.index_changed(self._label(instance), message.events):
                    self._mailbox.send(rank, WantSnapshot())
            case Held():
                self._scheduler.groups.index_snapshot(self._label(instance), message.snapshot)
            case Room():
                self._scheduler.has_room(self._label(instance), message, (now_ns := self._now_ns()), now_ns)
            case Broken() | LeftAlone():
                if not self._goes_on_without(self._label(instance), message):
                    raise InstanceFailed(f"{self._label(instance)} failed: {message.detail}")
                if instance not in self._watch.lost:
                    self._watch.broken.add(instance)
                    self._break(instance)
            case _ if isinstance(message, Message):
                if instance not in self._watch.lost:
                    self._scheduler.receive(message, self._now_ns())
            case _:
                raise TypeError(f"the global scheduler takes no {type(message).__name__}")

    def _welcome_back(self, instance: int) -> None:
        """An instance was silent, and gives a sign of life."""
        _log.warning("%s is back", self._label(instance))
        if self._member(instance).standing is Standing.SERVING:
            self._scheduler.instance_back(self._label(instance), self._now_ns())
            self._members.retry_held(self._now_ns())

    def _deliver(self) -> None:
        """What the global scheduler has to say; instances take it in order."""
        for destination, message in self._scheduler.drain_outbox():
            if destination == CLIENT:
                assert isinstance(message, Tokens | Finished)
                self._client.receive(message, self._now_ns())
            elif (instance := self._members.labels.index(destination)) in self._turnover.here:
                self._mailbox.send(self._roster.leader(instance), message)

    def _look(self) -> None:
        """Looks now and then whether every process is still there."""
        for instance, finding in self._watch.look():
            if finding is Finding.GONE:
                self._lose(instance)
            elif finding is Finding.BROKEN:
                self._break(instance)
            else:
                _log.warning("%s is silent", self._label(instance))
                self._scheduler.instance_gone(self._label(instance), self._now_ns())
                self._deliver()

    def _break(self, instance: int) -> None:
        """One of its ranks is gone: it serves nobody any more, and is to end. Nobody frees what it may still write."""
        _log.warning("%s has lost a rank", self._label(instance))
        if self._mailbox.reaches(self._roster.leader(instance)):
            self._mailbox.send(self._roster.leader(instance), Leave())
        self._without(instance)

    def _lose(self, instance: int) -> None:
        _log.warning("%s is gone", self._label(instance))
        if not self._epoch_ns and not self._come_alone:
            raise InstanceFailed(f"{self._label(instance)} is gone before the run has begun")
        self._turnover.lose(instance, self._now_ns(), has_begun=self._epoch_ns > 0)
        self._without(instance)

    def _without(self, instance: int) -> None:
        """What it had is served elsewhere."""
        turnover, may_come = self._turnover, self._waits or not self._epoch_ns
        if not (turnover.here - self._watch.broken or turnover.vacancies.ranks or turnover.returning or may_come):
            raise InstanceFailed("every instance is gone")
        self._scheduler.instance_gone(self._label(instance), self._now_ns())
        self._deliver()
