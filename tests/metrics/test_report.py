import dataclasses
import json

import numpy as np
import pytest
from msgspec.structs import replace

from memserve.clock import to_ns
from memserve.decisions import FetchRecord
from memserve.kvcache.ticket import TransferCounts
from memserve.metrics.formulas import Slo
from memserve.metrics.repeats import combined, median_of
from memserve.metrics.report import InstanceStats, build_report, distribution
from memserve.request import FinishReason, Role

INSTANCES = [
    InstanceStats("colocated-0", Role.COLOCATED, busy_ns=4_000_000_000, num_steps=7, num_evicted_blocks=2),
    InstanceStats("colocated-1", Role.COLOCATED, busy_ns=0),
]


def figures(tree):
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, dict | list):
            yield from figures(value)
        else:
            yield value


def test_the_keys_that_others_read_are_there(make_timeline):
    report = build_report([make_timeline()], INSTANCES, wall_s=1.5)
    assert report.keys() >= {
        "num_requests", "num_finished", "num_failed", "ttft_s", "tpot_s", "itl_s", "jct_s", "tokens", "transfers",
        "instances", "quarantined_blocks", "near_ties", "wall_s",
    }  # fmt: skip
    for latency in ("ttft_s", "tpot_s", "itl_s", "max_itl_s", "decode_itl_s", "jct_s"):
        assert report[latency].keys() == {"mean", "p50", "p90", "p95", "p99"}
    assert list(report["tokens"]) == [
        "prompt",
        "cached_local",
        "fetched",
        "computed",
        "computed_again",
        "computed_on_decode",
        "generated",
        "computed_in_vain",
        "generated_in_vain",
    ]
    assert list(report["transfers"]) == ["p_to_d", "d_to_p", "between"]
    for way in ("p_to_d", "d_to_p", "between"):
        assert list(report["transfers"][way]) == [
            "tokens", "bytes", "bytes_in_vain", "transfers", "calls", "declined", "overtaken", "failed", "seconds",
        ]  # fmt: skip
    assert report["instances"][0].keys() >= {"id", "role", "busy_s"}


def test_counts_and_latencies_of_a_small_run(make_timeline):
    timelines = [
        make_timeline("a/0"),
        make_timeline("a/1", token_times=(4.0,), finished=4.0, num_cached=0, num_computed=100, num_preemptions=1),
        make_timeline("b/0", token_times=(), scheduled=None, finished=1.0, reason=FinishReason.REFUSED),
        make_timeline("c/0", token_times=(2.0,), finished=10.0, reason=FinishReason.ABORTED),
        make_timeline("d/0", token_times=(), finished=None, reason=None, num_cached=0, num_computed=0),
    ]
    instances = [dataclasses.replace(INSTANCES[0], num_computed=300, num_generated=5), INSTANCES[1]]
    counted = {"turns_over_context": 3, "turns_not_sent": 4, "workload": {"skipped_empty": 7}}
    report = build_report(timelines, instances, wall_s=0.5, **counted)
    assert report["workload"] == {"skipped_empty": 7}
    assert (report["num_requests"], report["num_finished"], report["num_failed"]) == (5, 2, 3)
    assert report["failures"] == {"aborted": 1, "refused": 1, "unfinished": 1}
    assert (report["num_sessions"], report["turns_over_context"], report["turns_not_sent"]) == (4, 3, 4)
    assert report["ttft_s"]["mean"] == 3.0 and report["ttft_s"]["p50"] == 3.0  # of those that succeeded
    assert report["tpot_s"] == {"mean": 1.5, "p50": 1.5, "p90": 1.5, "p95": 1.5, "p99": 1.5}  # one token: none
    assert report["itl_s"]["mean"] == 1.5 and report["itl_s"]["p90"] == pytest.approx(1.9)
    assert report["itl_s"]["p95"] == pytest.approx(1.95) and report["max_itl_s"]["mean"] == 2.0
    assert report["decode_itl_s"]["mean"] == report["decode_itl_s"]["p50"] == 2.0  # not the gap after a first token
    # of all that were begun: the refused one never was
    assert report["tokens"] == {
        "prompt": 400, "cached_local": 80, "fetched": 0, "computed": 220, "computed_again": 0,
        "computed_on_decode": 0, "generated": 5, "computed_in_vain": 80, "generated_in_vain": 0,
    }  # fmt: skip
    assert report["hit_ratio"] == 0.2
    assert report["makespan_s"] == 10.0 and report["preemptions"] == 1
    assert report["throughput"] == {
        "output_tokens_per_s": 0.5, "total_tokens_per_s": 40.5, "requests_per_s": 0.2,
    }  # fmt: skip


def test_instances_carry_their_own_counts_and_those_of_their_requests(make_timeline):
    report = build_report([make_timeline(), make_timeline("a/1")], INSTANCES, wall_s=0.5)
    busy, idle = report["instances"]
    assert (busy["id"], busy["role"], busy["busy_s"], busy["num_steps"]) == ("colocated-0", "colocated", 4.0, 7)
    assert (busy["utilisation"], busy["num_requests"], busy["hit_ratio"]) == (0.8, 2, 0.4)
    assert busy["num_evicted_blocks"] == 2
    assert (idle["num_requests"], idle["hit_ratio"], idle["utilisation"]) == (0, None, 0.0)
    assert report["skew"] == {"busy_s": 2.0, "num_requests": 2.0, "computed_tokens": 2.0}


def test_the_most_of_a_pool_that_was_held_is_a_share_of_it():
    [row] = build_report([], [InstanceStats("a", "colocated", 0, num_blocks=10, peak_used_blocks=4)], wall_s=0)[
        "instances"
    ]
    assert (row["peak_used_share"], row["utilisation"]) == (0.4, None)


def test_a_run_without_requests_gives_nulls_and_valid_json():
    report = build_report([], [], wall_s=0.0, slo=Slo(1.0, 1.0))
    assert report["ttft_s"] == dict.fromkeys(("mean", "p50", "p90", "p95", "p99"))
    assert report["itl_s"]["p99"] is None
    assert (report["hit_ratio"], report["makespan_s"], report["goodput"]["share"]) == (None, None, None)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_transfers_pass_through_and_goodput_is_off_by_default(make_timeline):
    report = build_report(
        [make_timeline()], INSTANCES, wall_s=1.0, p_to_d=TransferCounts(tokens=5, calls=2), near_ties=1
    )
    assert report["transfers"]["p_to_d"]["calls"] == 2 and report["transfers"]["d_to_p"]["calls"] == 0
    assert report["goodput"] is None and report["near_ties"] == 1
    bounded = build_report([make_timeline()], INSTANCES, wall_s=1.0, slo=Slo(2.0, 2.0, 2.0))
    assert bounded["goodput"] == {
        "slo": {"ttft_s": 2.0, "tpot_s": 2.0, "itl_s": 2.0, "jct_s": None},
        "num_good": 1,
        "share": 1.0,
        "requests_per_s": 0.2,
        "missed": {"ttft_s": 0, "tpot_s": 0, "itl_s": 0, "jct_s": 0},
    }


def fetching(timeline, outcome, actual_s=0.0):
    """Fetching was predicted to take 1 s, and computing 2 s."""
    record = FetchRecord(1, 0, 64, 1, 1.0, 2.0, True, to_ns(0.5), ended_ns=to_ns(0.5 + actual_s), outcome=outcome)
    num_fetched = 64 if outcome == "fetched" else 0
    timeline.stats = replace(timeline.stats, fetch=replace(record, num_fetched=num_fetched))
    return timeline


def test_fetches_that_took_longer_than_computing_are_counted_beside_what_was_predicted(make_timeline):
    outcomes = [("fetched", 1.5), ("fetched", 2.5), ("fetched", 8.0), ("refused", 9.0), ("computed", 0.0)]
    timelines = [fetching(make_timeline(f"s{n}/0"), *outcome) for n, outcome in enumerate(outcomes)]
    fetches = build_report(timelines, INSTANCES, wall_s=1.0)["fetches"]
    assert [fetches[key] for key in ("fetched", "refused", "computed", "failed")] == [3, 1, 1, 0]
    assert fetches["slower_than_computing"] == 2 and fetches["actual_s"]["mean"] == 4.0
    assert (fetches["predicted_s"]["p99"], fetches["computing_s"]["p50"]) == (1.0, 2.0)
    assert fetches["unused_tokens"] == 3 * 64, "nobody's stats say that they were used"
    timelines[0].stats = replace(timelines[0].stats, num_fetched=48)
    assert build_report(timelines, INSTANCES, wall_s=1.0)["fetches"]["unused_tokens"] == 2 * 64 + 16
    none = build_report(timelines[3:], INSTANCES, wall_s=1.0)["fetches"]
    assert none["slower_than_computing"] is None and none["actual_s"]["p50"] is None


def test_goodput_is_of_all_requests_and_what_failed_missed_no_objective(make_timeline):
    failed = make_timeline("c/0", token_times=(), reason=FinishReason.REFUSED)
    late = make_timeline("b/0", token_times=(4.0, 5.0))
    report = build_report([make_timeline(), late, failed], INSTANCES, wall_s=1.0, slo=Slo(ttft_s=3.0, tpot_s=1.2))
    goodput = report["goodput"]
    assert (goodput["num_good"], goodput["share"], goodput["requests_per_s"]) == (0, 0.0, 0.0)
    assert goodput["missed"] == {"ttft_s": 1, "tpot_s": 1, "itl_s": 0, "jct_s": 0}


def test_a_request_counts_at_both_of_its_instances(make_timeline):
    timeline = make_timeline(instance="prefill-0", num_preemptions=3)
    timeline.stats = replace(
        timeline.stats, decode_instance="decode-1", num_preemptions_on_decode=2, num_computed_on_decode=70
    )
    instances = [InstanceStats("prefill-0", Role.PREFILL, 0), InstanceStats("decode-1", Role.DECODE, 0)]
    report = build_report([timeline], instances, wall_s=1.0)
    prefill, decode = report["instances"]
    for key in ("computed", "computed_on_decode", "generated", "prompt", "cached_local"):
        assert prefill["tokens"][key] + decode["tokens"][key] == report["tokens"][key]
    assert (prefill["tokens"]["computed"], decode["tokens"]["computed"]) == (60, 0)
    assert (prefill["tokens"]["generated"], decode["tokens"]["generated"]) == (1, 2)
    assert (prefill["preemptions"], decode["preemptions"]) == (1, 2)
    assert (prefill["num_requests"], decode["num_requests"]) == (1, 1)
    assert report["tokens"]["computed_on_decode"] == decode["tokens"]["computed_on_decode"] == 70


class Walked(list):
    """Counts how often it is walked."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_requests_are_not_walked_again_for_each_instance(make_timeline):
    few, many = Walked([make_timeline()]), Walked([make_timeline()])
    build_report(few, INSTANCES[:1], wall_s=1.0)
    report = build_report(many, [InstanceStats(f"colocated-{n}", Role.COLOCATED, 0) for n in range(9)], wall_s=1.0)
    assert few.times == many.times > 0
    assert [row["num_requests"] for row in report["instances"]] == [1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_percentiles_interpolate_between_neighbours():
    assert distribution(np.arange(101.0)) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


def test_the_median_of_repeats_keeps_the_keys_and_shows_the_spread(make_timeline):
    reports = [
        build_report([make_timeline(finished=end)], INSTANCES, wall_s=1.0, turns_not_sent=2) for end in (5.0, 9.0, 6.0)
    ]
    reports[1]["failures"] = {"aborted": 1}
    reports[2]["hit_ratio"] = None
    several = median_of(reports)
    assert several["jct_s"]["p50"] == 6.0
    assert several["spread"]["jct_s"]["p50"] == {"min": 5.0, "max": 9.0}
    assert several["repeats"] == 3 and several["turns_not_sent"] == 2
    assert several["failures"] == {"aborted": 0} and several["spread"]["failures"] == {"aborted": {"min": 0, "max": 1}}
    assert several["hit_ratio"] == 0.4 and several["goodput"] is None
    assert several["instances"][0]["id"] == "colocated-0"
    assert several["instances"][0]["utilisation"] == pytest.approx(4 / 6)
    assert several.keys() - {"repeats", "spread"} == reports[0].keys()
    assert json.loads(json.dumps(several, allow_nan=False)) == several
    assert all(not isinstance(value, float) or np.isfinite(value) for value in figures(several))
    with pytest.raises(ValueError, match="at least one report"):
        median_of([])


def test_several_seeds_are_their_mean_and_one_run_is_itself(make_timeline):
    reports = [build_report([make_timeline(finished=end)], INSTANCES, wall_s=1.0) for end in (5.0, 9.0, 7.6)]
    several = combined(reports, [7, 8, 9])
    assert several["jct_s"]["p50"] == pytest.approx(7.2) and several["seeds"] == [7, 8, 9]
    assert several["spread"]["jct_s"]["p50"] == {"min": 5.0, "max": 9.0}
    assert combined(reports, [7])["jct_s"]["p50"] == 7.6 and combined(reports, [7])["repeats"] == 3
    assert combined(reports[:1], [7]) is reports[0]


def test_what_was_promised_to_a_request_that_began_at_time_0_counts(make_timeline):
    timeline = make_timeline(queued=0.0, scheduled=0.0, num_cached=40)
    timeline.num_promised = 50
    routing = build_report([timeline], INSTANCES, wall_s=1.0)["routing"]
    assert (routing["promised_tokens"], routing["wrong_hits"], routing["wrong_hit_tokens"]) == (50, 1, 10)
