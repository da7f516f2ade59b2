"""DistributedCluster: a configuration's cluster as processes under torchrun; the same instances, modes and messages.

    torchrun --nproc-per-node 3 scripts/run.py exec=distributed cluster=1p1d mode=pd_caching_3 transport=mapped

Rank 0 plays the client and routes (`Controller`); each other rank is an instance (node.py). Time is the machine's.
"""

import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import msgspec
import numpy as np
from torch.distributed.distributed_c10d import PrefixStore

from memserve.clock import monotonic_ns, to_ns, to_s
from memserve.cluster.build import Engine, build_engine, build_instance, build_roles
from memserve.cluster.launch import CONTROLLER, Place, choose_device, set_threads
from memserve.cluster.liveness import Watched
from memserve.cluster.mailbox import AnyMessage, Mailbox
from memserve.cluster.make import make
from memserve.cluster.node import InstanceLoop
from memserve.cluster.node_messages import (
    Alive,
    Broken,
    Changed,
    Gone,
    Held,
    Leave,
    Ping,
    Pong,
    Ready,
    Start,
    Stop,
    Stopped,
    WantSnapshot,
)
from memserve.cluster.result import Result, finish_runs
from memserve.cluster.summary import Summary, report_of
from memserve.cluster.warm_up import warm_up
from memserve.cluster.wiring import build_global_scheduler, build_process_transport, follows_events
from memserve.config.schema import RunConfig
from memserve.messages import Finished, Message, Tokens
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.request import Role
from memserve.sched.global_scheduler import CLIENT
from memserve.transfer.shared_memory import host_id
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Workload

READY_S = 900.0  # most time for every instance to load its model
STOP_S = 30.0  # beyond the transfers' own deadline
_WATCH_NS = 100_000_000  # between looks at the processes
_log = logging.getLogger("memserve")


class InstanceFailed(RuntimeError):
    """An instance's process has ended by an error, or does not answer."""


class DistributedCluster:
    """This process's part of the cluster. Raises ConfigError or ValueError for what cannot be run as configured.

    Collective: every rank makes the same calls.
    """

    def __init__(self, cfg: RunConfig, place: Place) -> None:
        self.cfg, self._place = cfg, place
        self._roles = build_roles(cfg)
        self._mailbox = Mailbox(place.rank, place.store, place.host)

    def run(self, output_dir: str | Path | None = None, *, progress: Progress | None = None) -> Report | None:
        """Plays the workload `repeats` times. Rank 0 returns the report and writes `output_dir`; others return None.

        Raises InstanceFailed on rank 0 when an instance ends by an error, LeftEarly on the others when rank 0 does.
        """
        signal.signal(signal.SIGTERM, _leave)
        try:
            if self._place.rank == CONTROLLER:
                return self._control(output_dir, progress)
            self._serve()
        except Exception as error:
            if self._place.rank != CONTROLLER:
                self._mailbox.send(CONTROLLER, Broken(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._mailbox.close()
        return None

    def run_once(self, number: int = 0, progress: Progress | None = None) -> Result | None:
        """One run from empty pools, on every rank; the result on rank 0. number: never used before."""
        if self._place.rank != CONTROLLER:
            self._serve_once(number, build_engine(self.cfg), set_threads(self.cfg, self._place))
            return None
        workload: Workload = make(self.cfg.workload)
        engine = build_engine(self.cfg, with_model=False)
        sessions = workload.sessions(engine.tokenizer, self.cfg.seed)
        return Controller(self.cfg, self._roles, self._mailbox, engine, sessions, workload.concurrency).run(progress)

    def _control(self, output_dir: str | Path | None, progress: Progress | None) -> Report:
        workload: Workload = make(self.cfg.workload)
        engine = build_engine(self.cfg, with_model=False)
        sessions = workload.sessions(engine.tokenizer, self.cfg.seed)
        results = [
            Controller(self.cfg, self._roles, self._mailbox, engine, sessions, workload.concurrency).run(progress)
            for _ in range(self.cfg.repeats)
        ]
        return finish_runs(self.cfg, results, output_dir)

    def _serve(self) -> None:
        num_threads = set_threads(self.cfg, self._place)
        choose_device(self._place)
        engine = build_engine(self.cfg)
        for number in range(self.cfg.repeats):
            self._serve_once(number, engine, num_threads)

    def _serve_once(self, number: int, engine: Engine, num_threads: int) -> None:
        incarnation = self._place.rank - 1
        label, role = self._roles[incarnation]
        if number == 0:
            warm_up(build_instance(self.cfg, engine, label, role, incarnation))
        transport = build_process_transport(self.cfg, PrefixStore(f"run/{number}", self._place.store))
        try:
            instance = build_instance(self.cfg, engine, label, role, incarnation, transport)
            if follows_events(self.cfg):
                instance.pool.follow()
            stop_s = self.cfg.transfer.deadline_s
            InstanceLoop(instance, self._mailbox, transport, stop_s=stop_s, num_threads=num_threads).run()
        finally:
            if transport is not None:
                transport.close()


class Controller:
    """Rank 0 in one run: the client, the global scheduler, and the watch over the instances' processes."""

    def __init__(
        self,
        cfg: RunConfig,
        roles: Sequence[tuple[str, Role]],
        mailbox: Mailbox,
        engine: Engine,
        sessions: Sequence[Session],
        concurrency: int | None,
    ) -> None:
        self._mailbox, self._labels = mailbox, [label for label, _ in roles]
        self._scheduler = build_global_scheduler(cfg, roles, np.random.default_rng(cfg.seed))
        self._client = SessionPlayer(sessions, engine.max_context, concurrency)
        self._stop_s = cfg.transfer.deadline_s + STOP_S
        self._ready: dict[int, Watched | None] = {}  # by instance; None: on another host, where nothing can be proved
        self._summaries: dict[int, Summary] = {}
        self._gone: set[int] = set()
        self._silent: set[int] = set()  # no proof that they are gone: they are routed around, and may come back
        self._heard_ns: dict[int, int] = {}
        self._silence_ns = to_ns(cfg.cluster.silence_s)
        self._epoch_ns = 0
        self._watched_ns = 0

    def run(self, progress: Progress | None) -> Result:
        """Until every request has ended and every instance has stopped. Raises InstanceFailed when one breaks."""
        try:
            self._until(lambda: len(self._ready) == len(self._labels), READY_S, "get ready")
            self._epoch_ns = monotonic_ns()
            self._tell_all(Start(self._epoch_ns))
            while not (self._client.done and not self._scheduler.num_unfinished):
                self._turn(progress)
            end_ns = self._now_ns()
            self._tell_all(Stop(end_ns))
            self._until(lambda: self._summaries.keys() >= self._left() - self._silent, self._stop_s, "stop")
        finally:
            self._tell_all(Leave())
        left = [self._summaries[i] for i in sorted(self._summaries)]
        timelines = list(self._scheduler.timelines.values())
        report = report_of(self._scheduler, left, self._client.counts, to_s(end_ns))
        occupancy = [sample for summary in left for sample in summary.occupancy]
        threads = {summary.stats.id: summary.num_threads for summary in left}
        return Result(report, timelines, occupancy, threads)

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
                late = self._left() - (self._summaries.keys() if self._summaries else self._ready.keys())
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
            self._take(sender - 1, message)
        self._deliver()

    def _take(self, instance: int, message: AnyMessage) -> None:
        self._heard(instance)
        match message:
            case Alive():
                pass
            case Ping():
                self._mailbox.send(1 + instance, Pong(message.sent_ns, monotonic_ns()))
            case Ready():
                self._ready[instance] = Watched(message.pid) if message.host == host_id() else None
            case Stopped():
                self._summaries[instance] = msgspec.msgpack.decode(message.summary, type=Summary)
            case Changed():
                if not self._scheduler.index_changed(self._labels[instance], message.events):
                    self._mailbox.send(1 + instance, WantSnapshot())
            case Held():
                self._scheduler.index_snapshot(self._labels[instance], message.snapshot)
            case Broken():
                raise InstanceFailed(f"{self._labels[instance]} failed: {message.detail}")
            case _ if isinstance(message, Message):
                if instance not in self._gone:
                    self._scheduler.receive(message, self._now_ns())
            case _:
                raise TypeError(f"the global scheduler takes no {type(message).__name__}")

    def _heard(self, instance: int) -> None:
        self._heard_ns[instance] = monotonic_ns()
        if instance in self._silent:
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
                self._mailbox.send(1 + instance, message)

    def _watch(self) -> None:
        """Looks now and then whether every process is still there."""
        if monotonic_ns() - self._watched_ns < _WATCH_NS:
            return
        self._watched_ns = monotonic_ns()
        for instance, watched in self._ready.items():
            if instance not in self._gone and watched is not None and watched.is_gone:
                self._lose(instance)
        for instance, heard_ns in self._heard_ns.items():
            silent = instance in self._gone or instance in self._silent
            if self._epoch_ns and not silent and monotonic_ns() - heard_ns > self._silence_ns:
                _log.warning("%s is silent", self._labels[instance])
                self._silent.add(instance)
                self._scheduler.instance_gone(self._labels[instance], self._now_ns())
                self._deliver()

    def _lose(self, instance: int) -> None:
        _log.warning("%s is gone", self._labels[instance])
        self._gone.add(instance)
        if not self._left():
            raise InstanceFailed("every instance is gone")
        self._tell_all(Gone(instance))
        self._scheduler.instance_gone(self._labels[instance], self._now_ns())
        self._deliver()

    def _tell_all(self, message: AnyMessage) -> None:
        for instance in self._left():
            self._mailbox.send(1 + instance, message)


def _leave(signum: int, frame: FrameType | None) -> None:
    """A clean end on SIGTERM, as on SIGINT."""
    raise SystemExit(128 + signum)
