"""LocalCluster: a configuration's cluster in this process. Builds it, plays the workload, reports.

    report = LocalCluster(load_config(["index=none", "workload.num_sessions=4"])).run()

Each of several runs starts from empty pools, and plays the same sessions (`repeats=`) or those of a seed of its own
(`seeds=`). A measured run is preceded by a warm-up before time 0.
"""

from functools import partial
from pathlib import Path

import numpy as np

from memserve.clock import monotonic_ns, to_ns, to_s
from memserve.cluster.build import (
    build_instance,
    build_roles,
    build_step_time,
    check_wired,
)
from memserve.cluster.capacity import describe_moved, describe_pools
from memserve.cluster.control import ControlCosts
from memserve.cluster.emulated import EmulatedCluster
from memserve.cluster.emulated_node import Node
from memserve.cluster.engine import Engine, build_engine
from memserve.cluster.make import make
from memserve.cluster.manager import ClusterManager
from memserve.cluster.result import Result, finish_runs
from memserve.cluster.summary import activity_of, report_of
from memserve.cluster.warm_up import warm_up
from memserve.cluster.wiring import build_global_scheduler, build_scaling, build_transport, transfers_kv
from memserve.config.errors import ConfigError
from memserve.config.runs import num_runs, of_run
from memserve.config.schema import RunConfig
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.request import SERVING
from memserve.transfer.link import LinkModel
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Workload, sessions_of


def check_playable(cfg: RunConfig) -> None:
    """Raises ConfigError for what no LocalCluster can be made of, as far as that is seen without the model and the
    workload's files.
    """
    if cfg.exec == "distributed":
        raise ConfigError("exec=distributed in one process: expected emulated or simulated, or torchrun")
    check_wired(cfg)


class LocalCluster:
    """Instances, global scheduler and client of one process, emulated or simulated.

    Loads the model and the workload. Raises ConfigError or ValueError, before anything runs, for what cannot be run as
    configured. memory: what fits into an instance's pool, in one line.  moved: what moves between instances for a
    token, in a simulation where something does; else "".
    """

    def __init__(self, cfg: RunConfig) -> None:
        check_playable(cfg)
        self.cfg = cfg
        self._roles = build_roles(cfg)
        self._workload: Workload = make(cfg.workload)
        self.engine: Engine = build_engine(cfg)
        kinds = list(dict.fromkeys(role for _, role in self._roles))
        self._step_time = build_step_time(cfg, kinds, self.engine)
        self._seed, self._sessions = cfg.seed, sessions_of(self._workload, self.engine.tokenizer, cfg.seed)
        self.memory = describe_pools(cfg, kinds, self.engine.config)
        self.moved = describe_moved(cfg) if transfers_kv(cfg) else ""
        built = self._build(cfg)  # a pool that does not fit fails here, and a policy that contradicts its index source
        self._built = None if self._step_time.is_measured else built  # a warm-up needs the memory of its pools

    def run(self, output_dir: str | Path | None = None, *, progress: Progress | None = None) -> Report:
        """Plays the workload, `repeats` times or with `seeds` seeds, and returns the report; of several repeats the
        medians, of several seeds the means, and their spread.

        output_dir: where the files go (requests.jsonl and occupancy.jsonl: of the last run); None writes none.
        """
        runs = range(num_runs(self.cfg))
        return finish_runs(self.cfg, [self.run_once(progress, number) for number in runs], output_dir)

    def run_once(self, progress: Progress | None = None, number: int = 0) -> Result:
        """One run from empty pools, after a warm-up if it is measured; checks every instance's books at its end.

        number: of the run, from 0 on, whose seed it has.
        """
        if self._step_time.is_measured:
            self._warm_up()
        return self.play(self.cluster(number), progress)

    def play(self, cluster: EmulatedCluster, progress: Progress | None = None) -> Result:
        """Drives one of this configuration's clusters to its end, with all that was prepared on it (`call_at`,
        `faults`); checks every instance's books then.
        """
        player, started_ns = cluster.client, monotonic_ns()
        while cluster.advance():
            if progress is not None:
                progress.update(player.counts.turns_ended, player.counts.num_turns, to_s(cluster.now_ns))
        for node in cluster.nodes:
            if not node.is_gone:
                node.instance.check()
        timelines, summaries = list(cluster.scheduler.timelines.values()), cluster.summaries()
        wall_s = to_s(monotonic_ns() - started_ns)
        counted = (player.counts, wall_s, self.cfg.slo, self.cfg.measure, self._workload)
        report = report_of(cluster.scheduler, cluster.members, summaries, *counted, cluster.control_plane.figures())
        occupancy = [sample for summary in summaries for sample in summary.occupancy]
        return Result(report, timelines, occupancy, activity_of(summaries, cluster.members.labels))

    def cluster(self, number: int = 0) -> EmulatedCluster:
        """The cluster with empty pools before its first event, for who prepares something (`call_at`) and has it played
        (`play`), or drives it alone (`advance`). number: of its run, from 0 on, whose seed it has.
        """
        built, self._built = self._built, None
        return built if built is not None and number == 0 else self._build(of_run(self.cfg, number))

    def _sessions_of(self, seed: int) -> list[Session]:
        """Those of a seed, of which one at a time is remembered."""
        if seed != self._seed:
            self._seed, self._sessions = seed, sessions_of(self._workload, self.engine.tokenizer, seed)
        return self._sessions

    def _build(self, cfg: RunConfig) -> EmulatedCluster:
        """cfg: of a run."""
        transport = build_transport(cfg)
        build = partial(build_instance, cfg, self.engine, transport=transport)
        nodes = [Node(build(label, role, number)) for number, (label, role) in enumerate(self._roles)]
        scheduler = build_global_scheduler(cfg, self._roles, np.random.default_rng(cfg.seed), self.engine.config)
        player = SessionPlayer(self._sessions_of(cfg.seed), self.engine.max_context, self._workload.concurrency)
        link: LinkModel = make(cfg.link)
        scaling = build_scaling(cfg, [role for _, role in self._roles])
        return EmulatedCluster(
            nodes,
            scheduler,
            player,
            self._step_time,
            cfg.macro_steps,
            transport,
            event_delay_ns=link.message_ns,
            control=ControlCosts(to_ns(cfg.control.latency_s), to_ns(cfg.control.request_s)),
            manager=ClusterManager(self._roles, scaling, scheduler, make(cfg.heir)),
            build=build,
        )

    def _warm_up(self) -> None:
        label, role = next(member for member in self._roles if member[1] in SERVING)
        warm_up(build_instance(self.cfg, self.engine, label, role, incarnation=0))
