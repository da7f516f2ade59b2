"""LocalCluster: a configuration's cluster in this process. Builds it, plays the workload, reports.

    report = LocalCluster(load_config(["index=none", "workload.num_sessions=4"])).run()

Each repeat starts from empty pools and plays the same sessions. A measured run is preceded by a warm-up before time 0.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memserve.clock import monotonic_ns, to_s
from memserve.cluster.build import Engine, build_engine, build_instance, build_roles, build_step_time, describe_pool
from memserve.cluster.emulated import EmulatedCluster
from memserve.cluster.emulated_node import Node
from memserve.cluster.make import make
from memserve.cluster.wiring import build_global_scheduler, build_transport
from memserve.compose import to_dict, to_yaml
from memserve.config.schema import RunConfig
from memserve.instance import Instance
from memserve.kvcache.ticket import TransferCounts
from memserve.messages import Dispatch, pack_tokens
from memserve.metrics.occupancy import Sample
from memserve.metrics.output import environment, write_output
from memserve.metrics.progress import Progress
from memserve.metrics.report import InstanceStats, Report, build_report, median_of
from memserve.metrics.tracking import Tracking
from memserve.request import Role, SamplingParams
from memserve.timeline import RequestTimeline
from memserve.transfer.transport import Transport
from memserve.workload.player import SessionPlayer
from memserve.workload.session import Session, Workload

WARM_UP_PROMPTS = (300, 64, 17)  # tokens; with the answers below, steps of every kind run once
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Result:
    """One run: its report, every request's timeline in order of submission, and the pools, instance by instance."""

    report: Report
    timelines: list[RequestTimeline]
    occupancy: list[Sample]


class LocalCluster:
    """Instances, global scheduler and client of one process, emulated or simulated.

    Loads the model and the workload. Raises ConfigError or ValueError, before anything runs, for what cannot be run as
    configured. memory: what fits into an instance's pool, in one line.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self._roles = build_roles(cfg)
        self._step_time = build_step_time(cfg)
        workload: Workload = make(cfg.workload)
        self._concurrency = workload.concurrency
        self.engine: Engine = build_engine(cfg)
        self._sessions: list[Session] = workload.sessions(self.engine.tokenizer, cfg.seed)
        self.memory = describe_pool(cfg, self.engine)
        self._instances(build_transport(cfg))  # a pool that does not fit fails here

    def run(self, output_dir: str | Path | None = None, *, progress: Progress | None = None) -> Report:
        """Plays the workload `repeats` times and returns the report; of several runs the medians and their spread.

        output_dir: where the files go (requests.jsonl and occupancy.jsonl: of the last run); None writes none.
        """
        results = [self.run_once(progress) for _ in range(self.cfg.repeats)]
        reports = [result.report for result in results]
        report = reports[0] if len(reports) == 1 else median_of(reports)
        directory = None if output_dir is None else Path(output_dir)
        if directory is not None:
            write_output(
                directory,
                config_yaml=to_yaml(self.cfg),
                report=report,
                timelines=results[-1].timelines,
                occupancy=results[-1].occupancy,
                environment=environment({"seed": self.cfg.seed}, sys.argv),
            )
        tracking: Tracking = make(self.cfg.tracking)
        tracking.record(to_dict(self.cfg), report, directory)
        return report

    def run_once(self, progress: Progress | None = None) -> Result:
        """One run from empty pools, after a warm-up if it is measured; checks every instance's books at its end."""
        if self._step_time.is_measured:
            self._warm_up()
        cluster, started_ns = self.cluster(), monotonic_ns()
        player, nodes = cluster.client, cluster.nodes
        while cluster.advance():
            if progress is not None:
                progress.update(player.counts.turns_ended, player.counts.num_turns, to_s(cluster.now_ns))
        for node in nodes:
            if not node.is_gone:
                node.instance.check()
        timelines = list(cluster.scheduler.timelines.values())
        report = build_report(
            timelines,
            [_stats(node) for node in nodes],
            wall_s=to_s(monotonic_ns() - started_ns),
            turns_over_context=player.counts.turns_over_context,
            turns_not_sent=player.counts.turns_not_sent,
            p_to_d=_transfers(nodes, Role.PREFILL),
            d_to_p=_transfers(nodes, Role.DECODE),
            quarantined_blocks=sum(
                h.transfers.num_quarantined for node in nodes if (h := node.instance.handoffs) and not node.is_gone
            ),
        )
        occupancy = [sample for node in nodes for sample in node.occupancy.samples(cluster.now_ns)]
        return Result(report, timelines, occupancy)

    def cluster(self) -> EmulatedCluster:
        """The cluster with empty pools before its first event, for who wants to drive it alone (`advance`)."""
        transport = build_transport(self.cfg)
        nodes = [Node(instance) for instance in self._instances(transport)]
        scheduler = build_global_scheduler(self.cfg, self._roles, np.random.default_rng(self.cfg.seed))
        player = SessionPlayer(self._sessions, self.engine.max_context, self._concurrency)
        return EmulatedCluster(nodes, scheduler, player, self._step_time, self.cfg.macro_steps, transport)

    def _instances(self, transport: Transport | None) -> list[Instance]:
        return [
            build_instance(self.cfg, self.engine, label, role, incarnation, transport)
            for incarnation, (label, role) in enumerate(self._roles)
        ]

    def _warm_up(self) -> None:
        """Serves a few prompts on an instance of its own, so that no first-time cost falls into a measured step."""
        label, role = self._roles[0]
        instance = build_instance(self.cfg, self.engine, label, role, incarnation=0)
        params = SamplingParams(max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        for name, tokens in _fitting(instance, params):
            instance.receive(Dispatch(name, 0, "", pack_tokens(tokens), params, 0))
        while (batch := instance.schedule(0)) is not None:
            instance.commit(batch, instance.forward(batch), np.zeros(batch.num_steps, dtype=np.int64))
            instance.drain_outbox()


def _fitting(instance: Instance, params: SamplingParams) -> Iterable[tuple[str, np.ndarray]]:
    """The warm-up prompts that this instance can serve."""
    limits = instance.limits
    most = min(limits.max_context, limits.num_blocks * limits.block_size) - params.max_tokens
    for length in WARM_UP_PROMPTS:
        if length < most:
            yield f"warm-up-{length}", np.arange(length, dtype=np.int32) % limits.vocab_size


def _transfers(nodes: Iterable[Node], role: Role) -> TransferCounts:
    """What the instances of a role have sent, together."""
    total = TransferCounts()
    for node in nodes:
        if (handoffs := node.instance.handoffs) is not None:
            if node.instance.role is role:
                total += handoffs.transfers.counts
            else:
                total.overtaken += handoffs.num_overtaken
    return total


def _stats(node: Node) -> InstanceStats:
    pool = node.instance.pool.stats()
    return InstanceStats(
        id=node.instance.label,
        role=node.instance.role,
        busy_ns=node.busy_ns,
        num_steps=node.instance.scheduler.counts.steps,
        num_evicted_blocks=pool.num_evicted,
        num_swapped_out_blocks=pool.num_swapped_out,
        num_swapped_in_blocks=pool.num_swapped_in,
        num_swaps_dropped=node.instance.scheduler.counts.swaps_dropped,
        num_blocks=pool.num_blocks,
        peak_used_blocks=pool.peak_used,
        num_indexed_blocks=pool.num_indexed,
        peak_waiting_handoffs=0 if node.instance.handoffs is None else node.instance.handoffs.peak_waiting,
    )
