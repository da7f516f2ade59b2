from dataclasses import astuple

import pytest
from msgspec.structs import replace

from memserve.clock import to_ns
from memserve.metrics.formulas import Phases, Slo, instance_s, makespan_s, measure, skew, window_ns


def test_latencies_follow_from_the_timestamps(make_timeline):
    metrics = measure(make_timeline(arrival=0.25))
    assert metrics.ttft == 1.75
    assert metrics.second_token == 2.75
    assert metrics.tpot == 1.5
    assert metrics.itl.tolist() == [1.0, 2.0] and metrics.max_itl == 2.0
    assert metrics.jct == 4.75


def test_an_answer_of_one_token_has_no_tpot_and_no_gaps(make_timeline):
    metrics = measure(make_timeline(token_times=(2.0,), finished=2.0))
    assert (metrics.ttft, metrics.second_token, metrics.tpot) == (2.0, None, None)
    assert metrics.itl.tolist() == [] and metrics.max_itl is None


def test_a_request_without_tokens_has_no_latencies(make_timeline):
    timeline = make_timeline(token_times=(), scheduled=None, finished=None, reason=None)
    metrics = measure(timeline)
    assert (metrics.ttft, metrics.tpot, metrics.jct) == (None, None, None)
    assert metrics.phases == Phases(dispatch=0.5, queue=None, prefill=None, decode=None)
    timeline.stats = None
    assert measure(timeline).phases == Phases()


def test_phases_add_up_to_the_completion_time(make_timeline):
    metrics = measure(make_timeline(arrival=0.25, finished=5.5))
    assert metrics.phases == Phases(dispatch=0.25, queue=0.5, prefill=1.0, decode=3.5)
    phases = metrics.phases
    assert phases.dispatch + phases.queue + phases.prefill + phases.decode == metrics.jct


def handed_over(timeline, asked, read, granted, arrived):
    """The timeline, which is scheduled at 1 and has its first token at 2, with a hand-off to who begins at 3.25."""
    times = {"asked_ns": asked, "ask_read_ns": read, "granted_ns": granted, "arrived_ns": arrived, "received_ns": 3.0}
    times_ns = {name: to_ns(time) for name, time in (times | {"decode_scheduled_ns": 3.25}).items()}
    timeline.stats = replace(timeline.stats, **times_ns)
    return timeline


@pytest.mark.parametrize(
    ("events", "phases"),
    [
        ((2.0, 2.25, 2.5, 2.75), Phases(0.5, None, 0.5, 1.0, 0.25, 0.25, 0.25, 0.5, 1.75)),
        ((2.0, 2.5, 2.5, 3.0), Phases(0.5, None, 0.5, 1.0, 0.5, 0.0, 0.5, 0.25, 1.75)),
        ((1.0, 1.25, 1.5, 2.5), Phases(0.5, None, 0.5, 1.0, 0.0, 0.0, 0.5, 0.75, 1.75)),
        ((1.0, 1.25, 2.25, 2.5), Phases(0.5, None, 0.5, 1.0, 0.0, 0.25, 0.25, 0.75, 1.75)),
        ((1.25, 1.5, 1.75, 1.75), Phases(0.5, None, 0.5, 1.0, 0.0, 0.0, 0.0, 1.25, 1.75)),
        ((2.25, 2.5, 2.5, 2.75), Phases(0.5, None, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 1.75)),
        ((2.0, 1.75, 2.5, 2.25), Phases(0.5, None, 0.5, 1.0, 0.0, 0.5, 0.0, 0.75, 1.75)),
    ],
    ids=[
        "room later",
        "room at once",
        "by layer",
        "by layer, room later",
        "asked again by layer",
        "refused first",
        "clocks apart",
    ],
)
def test_a_request_that_was_handed_over_has_nine_phases_that_add_up(make_timeline, events, phases):
    metrics = measure(handed_over(make_timeline(token_times=(2.0, 4.0, 5.0)), *events))
    assert metrics.phases == phases
    assert sum(phase or 0.0 for phase in astuple(metrics.phases)) == metrics.jct


@pytest.mark.parametrize(
    ("slo", "missed", "missed_by_one_token"),
    [
        (Slo(), [], []),
        (Slo(2.0, 1.5, 2.0, 5.0), [], []),
        (Slo(ttft_s=1.9), ["ttft_s"], ["ttft_s"]),
        (Slo(tpot_s=1.4), ["tpot_s"], []),
        (Slo(itl_s=1.9), ["itl_s"], []),
        (Slo(tpot_s=1.5, itl_s=1.5), ["itl_s"], []),
        (Slo(jct_s=4.9), ["jct_s"], ["jct_s"]),
        (Slo(1.0, 1.0, 1.0, 1.0), ["ttft_s", "tpot_s", "itl_s", "jct_s"], ["ttft_s", "jct_s"]),
    ],
)
def test_objectives_are_met_up_to_their_bound_and_by_what_has_no_such_latency(
    make_timeline, slo, missed, missed_by_one_token
):
    assert slo.missed(measure(make_timeline())) == missed
    assert slo.missed(measure(make_timeline(token_times=(2.0,)))) == missed_by_one_token


def test_makespan_runs_from_the_first_arrival_to_the_last_end(make_timeline):
    late = make_timeline("b/0", arrival=3.0, finished=9.0)
    assert makespan_s(window_ns([make_timeline(arrival=0.25), late])) == 8.75
    assert makespan_s(window_ns([])) is None
    assert makespan_s(window_ns([make_timeline(finished=None, reason=None)])) is None


def test_instance_seconds_are_those_between_the_first_arrival_and_the_last_end():
    stays_s = [(0, None), (3, None), (0, 4), (11, None), (0, 1), (0, 40)]
    stays_ns = [(since * 10**9, None if until is None else until * 10**9) for since, until in stays_s]
    assert instance_s((2 * 10**9, 10 * 10**9), stays_ns) == 8 + 7 + 2 + 0 + 0 + 8
    assert instance_s(None, stays_ns) is None


def test_skew_is_one_when_even_and_the_count_when_all_is_on_one():
    assert skew([2, 2, 2]) == 1.0
    assert skew([6, 0, 0]) == 3.0
    assert skew([0, 0]) is None and skew([]) is None
