"""Report: a run in figures. From timelines and the instances' own counts to the dict that becomes report.json.

Its keys are an interface: plots, comparisons and other programs read them. Times in seconds. A figure that does not
exist (no request finished, no second token) is null. Knows no files.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memserve.clock import to_s
from memserve.kvcache.ticket import TransferCounts
from memserve.metrics import formulas
from memserve.metrics.goodput import class_figures, goodput_figures
from memserve.metrics.latencies import distribution, latencies
from memserve.metrics.measured import ALL, MeasuredPart, measured_figures
from memserve.metrics.migrations import migration_figures
from memserve.metrics.moved import all_transfers
from memserve.metrics.parts import instances_of, part_of
from memserve.metrics.routing_figures import routing_figures
from memserve.request import SERVING
from memserve.request_stats import RequestStats
from memserve.timeline import RequestTimeline

Report = dict[str, Any]
_NO_TRANSFERS = TransferCounts()
_NO_SLO = formulas.Slo()
_NOBODY_CAME = {"joined": 0, "left": 0, "lost": 0, "switched": 0, "bequeathed_tokens": 0, "bequests_declined": 0}
_NO_FIGURES: Mapping[str, Any] = {}
_NO_TREES = {"tree_blocks": 0, "tree_evicted_blocks": 0, "tree_expired_blocks": 0}


@dataclass(frozen=True)
class InstanceStats:
    """What an instance counted over a run; what requests say of it is added in the report.

    id: its label.  role: a Role.  busy_ns: time spent in steps, for a report in the time that is measured, which ends
    with the last request.  num_evicted_blocks: index blocks given up for space.
    num_swapped_out_blocks, num_swapped_in_blocks: blocks moved to DRAM and back.  num_swaps_dropped: requests that were
    preempted to DRAM and had to be recomputed after all.
    num_blocks, num_dram_blocks: its pool's, in HBM and in DRAM.  peak_used_blocks: most of HBM that anyone but the
    index held at a time.  num_indexed_blocks: in the index at the end.  peak_waiting_handoffs: most requests that
    waited at a time for a decode instance's room.
    num_computed, num_generated: all tokens that it prefilled and generated, whatever came of their requests.
    joined_ns, left_ns: when it came and went, on the cluster's clock; None: it is there at the end.
    """

    id: str
    role: str
    busy_ns: int
    num_steps: int = 0
    num_evicted_blocks: int = 0
    num_swapped_out_blocks: int = 0
    num_swapped_in_blocks: int = 0
    num_swaps_dropped: int = 0
    num_blocks: int = 0
    num_dram_blocks: int = 0
    peak_used_blocks: int = 0
    num_indexed_blocks: int = 0
    peak_waiting_handoffs: int = 0
    num_computed: int = 0
    num_generated: int = 0
    joined_ns: int = 0
    left_ns: int | None = None


def build_report(
    timelines: Sequence[RequestTimeline],
    instances: Sequence[InstanceStats],
    *,
    wall_s: float,
    p_to_d: TransferCounts = _NO_TRANSFERS,
    d_to_p: TransferCounts = _NO_TRANSFERS,
    between: TransferCounts = _NO_TRANSFERS,
    turns_over_context: int = 0,
    turns_not_sent: int = 0,
    quarantined_blocks: int = 0,
    tree_counts: Mapping[str, int] = _NO_TREES,
    near_ties: int | None = None,
    membership: Mapping[str, int] = _NOBODY_CAME,
    stays_ns: Sequence[tuple[int, int | None]] | None = None,
    slo: formulas.Slo = _NO_SLO,
    classes: Mapping[str, formulas.Slo] = _NO_FIGURES,
    workload: Mapping[str, Any] = _NO_FIGURES,
    control: Report | None = None,
    store: Report | None = None,
    part: MeasuredPart = ALL,
) -> Report:
    """The report of one run.

    timelines: every request that was submitted. Latencies are of those that succeeded; token counts of the attempts by
    which requests ended, where an instance began them; what instances computed beside that was in vain.  wall_s:
    seconds on this machine's clock.  p_to_d, d_to_p: sent by prefill instances to decode instances, and back.
    between: by those of one role.  tree_counts: of the global scheduler's prompt trees.  near_ties: None: not counted.
    membership: instances that came and went, and what they left to others.  stays_ns: from when until when each was
    there, also those without a row; None: as the rows say.  slo: what counts under `goodput`; null where nothing is
    asked for.  classes: of the requests of each class.  workload, control, store: their figures.  part: what counts.
    """
    window, counted = formulas.window_ns(timelines), part.of(timelines)
    span = part.within(window)
    makespan_s, span_s = formulas.makespan_s(window), formulas.makespan_s(span)
    rows = _instances(instances, timelines, counted, span)
    stays, tokens = stays_ns or [(i.joined_ns, i.left_ns) for i in instances], _all_tokens(counted, rows)
    return {
        **_of_requests(counted, slo, classes, span_s),
        "num_sessions": len({timeline.session_id for timeline in timelines}),
        "measured": measured_figures(part, timelines, span_s),
        "workload": dict(workload),
        "turns_over_context": turns_over_context,
        "turns_not_sent": turns_not_sent,
        "tokens": tokens,
        "hit_ratio": _hit_ratio(tokens),
        "throughput": _throughput(part, timelines, tokens, span_s),
        "transfers": all_transfers(p_to_d=p_to_d, d_to_p=d_to_p, between=between),
        "store": store and store | {"hit_ratio": formulas.ratio(store["fetched_tokens"], tokens["prompt"])},
        "instances": rows,
        "membership": {**membership, "instance_s": formulas.instance_s(span, stays)},
        "skew": _skew([row for row in rows if row["role"] in SERVING]),
        "routing": routing_figures(counted, rows, tree_counts),
        "control": control and control | {"utilisation": formulas.ratio(control["busy_s"], makespan_s)},
        "preemptions": sum(row["preemptions"] for row in rows),
        "quarantined_blocks": quarantined_blocks,
        "near_ties": near_ties,
        "makespan_s": makespan_s,
        "wall_s": wall_s,
    }


def _of_requests(
    timelines: Sequence[RequestTimeline], slo: formulas.Slo, classes: Mapping[str, formulas.Slo], span_s: float | None
) -> Report:
    """What the requests alone say, and the time in which they arrived."""
    succeeded = [formulas.measure(timeline) for timeline in timelines if timeline.succeeded]
    return {
        **_ends(timelines),
        **latencies(succeeded),
        "goodput": goodput_figures(len(timelines), succeeded, slo, classes, span_s),
        "classes": class_figures(timelines, succeeded, classes, span_s),
        "fetches": _fetches(timelines),
        "migrations": migration_figures(timelines),
    }


def _ends(timelines: Sequence[RequestTimeline]) -> Report:
    """How many requests there were, and how they ended; "unfinished" had not when the run did."""
    reasons = [timeline.reason for timeline in timelines if not timeline.succeeded]
    failures = Counter("unfinished" if reason is None else str(reason) for reason in reasons)
    return {
        "num_requests": len(timelines),
        "num_finished": len(timelines) - len(reasons),
        "num_failed": len(reasons),
        "failures": dict(sorted(failures.items())),
    }


def _begun(timelines: Sequence[RequestTimeline]) -> list[RequestStats]:
    """The counts of the requests that an instance began to compute."""
    found = [timeline.stats for timeline in timelines]
    return [stats for stats in found if stats is not None and stats.first_scheduled_ns is not None]


def _all_tokens(timelines: Sequence[RequestTimeline], rows: Sequence[Report]) -> dict[str, int]:
    """Those of the requests, and what the instances' rows have beside."""
    in_vain = {key: sum(row["tokens"][key] for row in rows) for key in ("computed_in_vain", "generated_in_vain")}
    return _tokens(_begun(timelines)) | in_vain


def _tokens(begun: Sequence[RequestStats]) -> dict[str, int]:
    """Token counts by origin. Prompts are `cached_local` + `fetched` + `computed` - `computed_again`, which after a
    preemption has tokens of the answer in it, too.
    """
    computed_again = (s.num_cached_local + s.num_fetched + s.num_computed - s.num_prompt for s in begun)
    return {
        "prompt": sum(stats.num_prompt for stats in begun),
        "cached_local": sum(stats.num_cached_local for stats in begun),
        "fetched": sum(stats.num_fetched for stats in begun),
        "computed": sum(stats.num_computed for stats in begun),
        "computed_again": sum(num for num in computed_again if num > 0),  # of one whose prefill ended early it is less
        "computed_on_decode": sum(stats.num_computed_on_decode for stats in begun),
        "generated": sum(stats.num_generated for stats in begun),
    }


def _fetches(timelines: Sequence[RequestTimeline]) -> Report:
    """Decisions of Eq. 2 by what came of them: `computed` by choice, `fetched`, or `refused` and `failed`: decided anew
    for another holder, if one was left, else computed.

    Of those fetched, both sides of Eq. 2 as they were predicted (`predicted_s`, `computing_s`: for all that were
    decided at once), how long each in fact waited for its KV (`actual_s`), of which until the last byte was there
    (`arrived_s`; what follows is the wait for the end of a step), and how many longer than computing was predicted to
    take (`slower_than_computing`). Null where nothing was fetched. `unused_tokens` were evicted before their turn came.
    """
    begun = [t.stats for t in timelines if t.stats is not None]
    last = [(stats.fetch, stats.num_fetched) for stats in begun if stats.fetch is not None]
    records = [record for one, _ in last for record in one.decisions]
    found = Counter(record.outcome for record in records)
    came = [(r, to_s(r.ended_ns - r.began_ns)) for r in records if r.outcome == "fetched" and r.ended_ns is not None]
    return {
        **{outcome: found[outcome] for outcome in ("computed", "fetched", "refused", "failed")},
        "unused_tokens": sum(max(one.num_fetched - used, 0) for one, used in last),
        "slower_than_computing": sum(actual_s > record.compute_s for record, actual_s in came) if came else None,
        "predicted_s": distribution([record.fetch_s for record, _ in came]),
        "actual_s": distribution([actual_s for _, actual_s in came]),
        "arrived_s": distribution([to_s((r.arrived_ns or r.began_ns) - r.began_ns) for r, _ in came]),
        "computing_s": distribution([record.compute_s for record, _ in came]),
    }


def _hit_ratio(tokens: dict[str, int]) -> float | None:
    """The share of prompt tokens that were found in a cache, the instance's own or another's."""
    return formulas.ratio(tokens["cached_local"] + tokens["fetched"], tokens["prompt"])


def _throughput(
    part: MeasuredPart, timelines: Sequence[RequestTimeline], tokens: dict[str, int], span_s: float | None
) -> Report:
    """Of a run: by the counts of its requests. Of a part: tokens that came to clients then, prompts whose first token
    was there then, and requests that ended well then, whenever they had arrived.
    """
    num_prompt, num_generated = tokens["prompt"], tokens["generated"]
    if not part.is_all:
        begun = [t.stats for t in timelines if t.stats is not None]
        num_prompt = sum(stats.num_prompt for stats in begun if part.has(stats.prefill_end_ns))
        num_generated = sum(part.count(t.token_times_ns) for t in timelines)
    num_ended = sum(t.succeeded and part.has(t.finished_ns) for t in timelines)
    return {
        "output_tokens_per_s": formulas.ratio(num_generated, span_s),
        "total_tokens_per_s": formulas.ratio(num_prompt + num_generated, span_s),
        "requests_per_s": formulas.ratio(num_ended, span_s),
    }


def _instances(
    instances: Sequence[InstanceStats],
    timelines: Sequence[RequestTimeline],
    counted: Sequence[RequestTimeline],
    span: tuple[int, int] | None,
) -> list[Report]:
    """The rows of `instances`. The requests are walked once for all of them: both may be many."""
    whole = _parts(timelines)
    begun = whole if counted is timelines else _parts(counted)
    refused = Counter(t.instance for t in counted if t.stats is None or t.stats.first_scheduled_ns is None)
    return [_instance(stats, whole[stats.id], begun[stats.id], refused[stats.id], span) for stats in instances]


def _parts(timelines: Sequence[RequestTimeline]) -> defaultdict[str, list[RequestStats]]:
    """What each instance did for the requests that were begun, by its label."""
    parts = defaultdict[str, list[RequestStats]](list)
    for whole in _begun(timelines):
        for instance in instances_of(whole):
            parts[instance].append(part_of(instance, whole))
    return parts


def _instance(
    stats: InstanceStats,
    whole: Sequence[RequestStats],
    begun: Sequence[RequestStats],
    num_refused: int,
    span: tuple[int, int] | None,
) -> Report:
    """One row: its own counts, and its part of the requests that it prefilled or decoded. whole: of all that were
    begun, which say what was in vain; begun: of those that are measured.
    """
    tokens = _tokens(begun)
    tokens |= _in_vain(stats, tokens if begun is whole else _tokens(whole))
    counts = asdict(stats)
    busy_s, joined_ns, left_ns = to_s(counts.pop("busy_ns")), counts.pop("joined_ns"), counts.pop("left_ns")
    return {
        "id": counts.pop("id"),
        "role": str(counts.pop("role")),
        "busy_s": busy_s,
        "utilisation": formulas.ratio(busy_s, formulas.instance_s(span, [(joined_ns, left_ns)])),
        "joined_s": to_s(joined_ns),
        "left_s": None if left_ns is None else to_s(left_ns),
        "num_requests": len(begun) + num_refused,
        "tokens": tokens,
        "hit_ratio": _hit_ratio(tokens),
        "preemptions": sum(request.num_preemptions for request in begun),
        **counts,
        "peak_used_share": formulas.ratio(stats.peak_used_blocks, stats.num_blocks),
    }


def _in_vain(stats: InstanceStats, tokens: dict[str, int]) -> dict[str, int]:
    """What it computed for attempts that were given up (failed hand-offs, lost peers): in no request's stats."""
    return {
        "computed_in_vain": stats.num_computed - tokens["computed"] - tokens["computed_on_decode"],
        "generated_in_vain": stats.num_generated - tokens["generated"],
    }


def _skew(rows: Sequence[Report]) -> dict[str, float | None]:
    """How unevenly the instances were used: largest over mean of each figure."""
    return {
        "busy_s": formulas.skew([row["busy_s"] for row in rows]),
        "num_requests": formulas.skew([row["num_requests"] for row in rows]),
        "computed_tokens": formulas.skew([row["tokens"]["computed"] for row in rows]),
    }
