"""Figures of a part of a run: of the requests that arrived in it, and of what happened in it."""

import json

import numpy as np
import pytest

from memserve.clock import to_ns
from memserve.metrics.formulas import Slo
from memserve.metrics.measured import ALL, MeasuredPart, measured_part
from memserve.metrics.plots import draw_latencies
from memserve.metrics.records import request_record
from memserve.metrics.report import InstanceStats, build_report
from memserve.request import FinishReason

INSTANCES = [  # one that is there from the start on, one that comes in the middle
    InstanceStats("colocated-0", "colocated", to_ns(3), num_computed=300, num_generated=11, num_steps=9),
    InstanceStats("colocated-1", "colocated", to_ns(0), joined_ns=to_ns(107)),
]
STAYS_NS = [(0, None), (to_ns(107), None)]


@pytest.fixture
def timelines(make_timeline):
    """Arrivals at 100, 104, 106 and 110."""
    return [
        make_timeline("a/0", 100, 100, 101, (102, 103, 105), 105, num_cached=0),
        make_timeline("b/0", 104, 104, 105, (106, 107, 108), 108, num_cached=40),
        make_timeline("b/1", 106, 106, 107, (109, 110, 112), 112, num_cached=80, num_preemptions=2),
        make_timeline("c/0", 110, 110, 110.5, (111, 113), 113, num_cached=20, num_preemptions=3),
    ]


def report_of(timelines, from_s=None, until_s=None, **more):
    part = measured_part(timelines, from_s, until_s)
    return build_report(timelines, INSTANCES, wall_s=1.0, stays_ns=STAYS_NS, slo=Slo(ttft_s=2.5), part=part, **more)


def test_requests_count_by_their_arrival_and_tokens_by_their_own_time(timelines):
    report = report_of(timelines, 4, 10)
    measured = report["measured"]
    assert {key: measured[key] for key in measured if key != "whole_run"} == {
        "from_s": 4.0, "until_s": 10.0, "seconds": 6.0, "num_requests": 2, "num_left_out": 2, "num_left_out_failed": 0,
    }  # fmt: skip
    assert (report["num_requests"], report["num_finished"], report["num_sessions"]) == (2, 2, 3)
    assert (report["ttft_s"]["mean"], report["jct_s"]["mean"], report["max_itl_s"]["mean"]) == (2.5, 5.0, 1.5)
    assert (report["tokens"]["prompt"], report["tokens"]["cached_local"], report["hit_ratio"]) == (200, 120, 0.6)
    # the last token of a, all of b/0's, one of b/1's: 110 is not in it any more; prompts of b; a and b/0 end in it
    assert report["throughput"] == pytest.approx(
        {"output_tokens_per_s": 5 / 6, "total_tokens_per_s": 205 / 6, "requests_per_s": 2 / 6}
    )
    goodput = report["goodput"]
    assert (goodput["num_good"], goodput["share"], goodput["missed"]["ttft_s"]) == (1, 0.5, 1)
    assert goodput["requests_per_s"] == pytest.approx(1 / 6)


def test_instances_count_the_requests_of_the_part_and_their_time_in_it(timelines):
    report = report_of(timelines, 4, 10)
    first, second = report["instances"]
    assert (first["num_requests"], first["tokens"]["computed"], first["preemptions"]) == (2, 120, 2)
    assert (first["utilisation"], second["utilisation"]) == (0.5, 0.0)
    assert report["membership"]["instance_s"] == 6 + 3
    assert report["preemptions"] == 2


def test_what_nobody_dated_is_of_the_whole_run(timelines):
    report = report_of(timelines, 4, 10, control={"busy_s": 1.3, "wait_s": {}})
    assert report["makespan_s"] == 13.0 and report["control"]["utilisation"] == pytest.approx(0.1)
    assert report["tokens"]["computed_in_vain"] == report["instances"][0]["tokens"]["computed_in_vain"] == 300 - 240
    assert (report["instances"][0]["num_steps"], report["instances"][0]["num_computed"]) == (9, 300)
    assert {"makespan_s", "control", "tokens.computed_in_vain", "instances.num_steps"} < {
        *report["measured"]["whole_run"]
    }


@pytest.mark.parametrize(("from_s", "until_s"), [(0, None), (None, 14), (0, 1000)])
def test_a_part_that_has_all_of_it_gives_the_figures_of_all(timelines, from_s, until_s):
    whole, part = report_of(timelines), report_of(timelines, from_s, until_s)
    assert whole.pop("measured") is None and part.pop("measured")["seconds"] == 13.0
    assert part == whole


@pytest.mark.parametrize(("from_s", "until_s", "ids"), [
    (None, 4, ["a/0"]), (4, None, ["b/0", "b/1", "c/0"]), (4, 6, ["b/0"]), (10, None, ["c/0"]), (7, 10, []),
])  # fmt: skip
def test_what_arrives_at_the_beginning_is_in_it_and_at_the_end_is_not(timelines, from_s, until_s, ids):
    part = measured_part(timelines, from_s, until_s)
    assert [t.request_id for t in part.of(timelines)] == ids
    assert [t.request_id for t in timelines if request_record(t, part=part)["measured"]] == ids
    assert report_of(timelines, from_s, until_s)["num_requests"] == len(ids)


@pytest.mark.parametrize(("from_s", "until_s", "seconds"), [(7, 9, 2.0), (50, None, 0.0), (50, 60, 0.0)])
def test_a_part_in_which_nothing_arrived_has_no_latencies_and_valid_json(timelines, from_s, until_s, seconds):
    report = report_of(timelines, from_s, until_s)
    assert (report["num_requests"], report["measured"]["num_left_out"]) == (0, 4)
    assert report["ttft_s"]["p95"] is None and report["hit_ratio"] is None and report["goodput"]["share"] is None
    assert report["measured"]["seconds"] == seconds
    assert report["throughput"]["output_tokens_per_s"] == (1.0 if seconds else None)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_failure_counts_where_it_arrived_and_elsewhere_is_told(timelines, make_timeline):
    refused = make_timeline("d/0", 105, 105, None, (), 105, FinishReason.REFUSED)
    in_it, before = (report_of([*timelines, refused], from_s) for from_s in (4, 6))
    assert (in_it["failures"], in_it["measured"]["num_left_out_failed"]) == ({"refused": 1}, 0)
    assert (before["failures"], before["measured"]["num_left_out_failed"]) == ({}, 1)


def test_a_run_without_requests_has_no_part(make_timeline):
    for timelines in ([], [make_timeline(token_times=(), finished=None, reason=None)]):
        report = report_of(timelines, 4, 10)
        assert report["measured"]["seconds"] is None and report["makespan_s"] is None
        assert report["throughput"] == dict.fromkeys(report["throughput"])


def test_times_are_counted_from_the_beginning_on_until_before_the_end():
    times_ns = np.array([1, 3, 3, 5], dtype=np.int64)
    assert [MeasuredPart(*bounds).count(times_ns) for bounds in ((None, None), (3, None), (None, 3), (3, 5))] == [
        4, 3, 1, 2,
    ]  # fmt: skip
    assert ALL.is_all and not MeasuredPart(0).is_all and not ALL.has(None)


def test_latencies_are_drawn_of_what_is_measured(timelines):
    records = [request_record(t, part=measured_part(timelines, 4, 10)) for t in timelines]
    panel = draw_latencies({"run": records}).axes[0]
    assert sorted(panel.lines[0].get_xdata()) == [2.0, 3.0]
