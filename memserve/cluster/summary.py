"""Summary: what an instance has to say at a run's end, and the report of all of them. The same in every execution."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from memserve.cluster.manager import ClusterManager
from memserve.config.schema import MeasureConfig, SloConfig
from memserve.instance import Instance
from memserve.kvcache.ticket import TransferCounts
from memserve.metrics.activity import Activity, ActivitySpan, Track, spans_of, steps_outside_ns
from memserve.metrics.formulas import Slo, window_ns
from memserve.metrics.measured import measured_part
from memserve.metrics.moved import store_figures
from memserve.metrics.occupancy import Occupancy, Sample
from memserve.metrics.report import InstanceStats, Report, build_report
from memserve.request import Role
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.timeline import RequestTimeline
from memserve.workload.classes import OBJECTIVES
from memserve.workload.player import PlayerCounts
from memserve.workload.session import Workload


class Summary(msgspec.Struct, frozen=True):
    """One instance's books at the end. sent: to each other one, by its number.  num_threads: of its process.
    num_near_ties: None: nobody counted them.
    """

    stats: InstanceStats
    sent: dict[int, TransferCounts]
    num_overtaken: int
    num_bequeathed_tokens: int
    num_bequests_declined: int
    num_dropped_deposits: int
    num_quarantined: int
    occupancy: list[Sample]
    tracks: list[Track]
    num_threads: int = 0
    num_near_ties: int | None = None


def summarize(
    instance: Instance,
    busy_ns: int,
    occupancy: Occupancy,
    activity: Activity,
    end_ns: int,
    num_threads: int = 0,
) -> Summary:
    """busy_ns: time that it spent in steps.  end_ns: of the run, or when it left."""
    pool, handoffs = instance.pool.stats(), instance.handoffs
    if handoffs is not None:
        activity.sent(handoffs.transfers.drain_sent())
    stats = InstanceStats(
        id=instance.label,
        role=instance.role,
        busy_ns=busy_ns,
        num_steps=instance.scheduler.counts.steps,
        num_evicted_blocks=pool.num_evicted,
        num_swapped_out_blocks=pool.num_swapped_out,
        num_swapped_in_blocks=pool.num_swapped_in,
        num_swaps_dropped=instance.scheduler.counts.swaps_dropped,
        num_blocks=pool.num_blocks,
        num_dram_blocks=pool.num_dram_blocks,
        peak_used_blocks=pool.peak_used,
        num_indexed_blocks=pool.num_indexed,
        peak_waiting_handoffs=0 if handoffs is None else handoffs.peak_waiting,
        num_computed=instance.scheduler.counts.computed,
        num_generated=instance.scheduler.counts.generated,
    )
    return Summary(
        stats,
        {} if handoffs is None else dict(handoffs.transfers.counts_by_peer),
        0 if handoffs is None else handoffs.returns.num_overtaken,
        0 if handoffs is None else handoffs.bequest.num_tokens,
        0 if handoffs is None else handoffs.bequest.num_declined,
        0 if handoffs is None else handoffs.deposits.num_dropped,
        0 if handoffs is None else handoffs.transfers.num_quarantined,
        occupancy.samples(end_ns),
        activity.tracks(),
        num_threads,
        instance.num_near_ties,
    )


def report_of(
    scheduler: GlobalScheduler,
    manager: ClusterManager,
    summaries: Sequence[Summary],
    counts: PlayerCounts,
    wall_s: float,
    slo: SloConfig,
    measure: MeasureConfig,
    workload: Workload,
    control: Report | None = None,
) -> Report:
    """The report of a run. summaries: of the instances that are left at its end, or have left before.

    measure: what part of it figures are of.  workload: that was played.  control: the control plane's figures, where
    its time is virtual and not 0.
    """
    timelines = list(scheduler.timelines.values())
    part = measured_part(timelines, measure.from_s, measure.until_s)
    span = part.within(window_ns(timelines))
    roles = [member.role for member in manager.members]
    transfers = _transfers(summaries, roles)
    near_ties = [summary.num_near_ties for summary in summaries if summary.num_near_ties is not None]
    return build_report(
        timelines,
        [manager.dated(_within(span, summary)) for summary in summaries],
        wall_s=wall_s,
        turns_over_context=counts.turns_over_context,
        turns_not_sent=counts.turns_not_sent,
        p_to_d=transfers[Role.PREFILL, Role.DECODE],
        d_to_p=transfers[Role.DECODE, Role.PREFILL],
        between=sum((transfers[role, role] for role in Role), TransferCounts()),
        tree_counts=scheduler.groups.tree_counts(),
        membership={**manager.counts(), **_bequests(summaries)},
        stays_ns=manager.stays_ns(),
        slo=Slo(**_objectives(slo)),
        classes={each.name: Slo(**{**_objectives(slo), **each.objectives}) for each in workload.classes},
        workload=workload.figures,
        control=control,
        store=_stores(part.of(timelines), summaries, roles),
        part=part,
        quarantined_blocks=sum(summary.num_quarantined for summary in summaries),
        near_ties=sum(near_ties) if len(near_ties) == len(summaries) else None,
    )


def _objectives(slo: SloConfig) -> dict[str, float | None]:
    return {name: getattr(slo, name) for name in OBJECTIVES}


def _within(span: tuple[int, int] | None, summary: Summary) -> InstanceStats:
    """An instance's counts, without the time of steps outside the time that is measured. Also without a part of the run
    there are some: after the last end of a request one that was given up may still be computed.
    """
    outside_ns = 0 if span is None else steps_outside_ns(summary.tracks, *span)
    return replace(summary.stats, busy_ns=summary.stats.busy_ns - outside_ns)


def _bequests(summaries: Sequence[Summary]) -> dict[str, int]:
    """What those that left have left to others: tokens of KV, and prefixes that nobody took."""
    return {
        "bequeathed_tokens": sum(summary.num_bequeathed_tokens for summary in summaries),
        "bequests_declined": sum(summary.num_bequests_declined for summary in summaries),
    }


def _stores(timelines: Sequence[RequestTimeline], summaries: Sequence[Summary], roles: Sequence[Role]) -> Report | None:
    """What the stores did; None where there are none. roles: see below."""
    numbers = [number for number, role in enumerate(roles) if role is Role.STORE]
    if not numbers:
        return None
    left = [summary for summary in summaries if summary.stats.role == Role.STORE]
    return store_figures(
        timelines,
        numbers,
        [(s.stats.num_dram_blocks, s.stats.num_indexed_blocks, s.stats.num_evicted_blocks) for s in left],
        [sum((s.sent[n] for s in summaries if n in s.sent), TransferCounts()) for n in numbers],
        [sum(s.sent.values(), TransferCounts()) for s in left],
        sum(summary.num_dropped_deposits for summary in summaries),
    )


def activity_of(summaries: Iterable[Summary], labels: Sequence[str]) -> list[ActivitySpan]:
    """What the instances did. labels: of all that there were, by their numbers."""
    return [span for summary in summaries for span in spans_of(summary.stats.id, summary.tracks, labels)]


def _transfers(summaries: Iterable[Summary], roles: Sequence[Role]) -> dict[tuple[Role, Role], TransferCounts]:
    """What was sent, by the roles of sender and receiver. roles: of all instances that there ever were, by number."""
    totals: defaultdict[tuple[Role, Role], TransferCounts] = defaultdict(TransferCounts)
    for summary in summaries:
        for peer, counts in summary.sent.items():
            totals[Role(summary.stats.role), roles[peer]] += counts
        if summary.num_overtaken:  # the receiver knows, and what is given back comes from where it was decoded
            totals[Role.DECODE, Role(summary.stats.role)].overtaken += summary.num_overtaken
    return totals
