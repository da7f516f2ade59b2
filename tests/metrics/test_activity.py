import itertools

import pytest

from memserve import LocalCluster, load_config
from memserve.kvcache.ticket import Sent
from memserve.metrics.activity import Activity, activity_lines, load_activity, spans_of, steps_outside_ns
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams

SIMULATED = ["exec=simulated", "workload.num_sessions=5", "workload.max_turns=3", "workload.max_output_tokens=40"]


def request(num_prompt, num_computed):
    made = Request("r", list(range(num_prompt)), SamplingParams())
    made.num_computed, made.prefill_end = num_computed, num_prompt
    return made


def test_a_step_tells_prefill_from_decode():
    activity = Activity()
    activity.step(ScheduledBatch([request(20, 8), request(5, 5)], [12, 1]), 1_000_000_000, 3_000_000_000)
    (span,) = spans_of("here", activity.tracks(), [])
    assert (span.instance, span.to, span.start_s, span.end_s, span.count) == ("here", "", 1.0, 3.0, 1)
    assert span.figures == {"requests": 2, "prefill_tokens": 12, "decode_tokens": 1, "swapped_blocks": 0}


def test_transfers_to_each_instance_have_a_track_of_their_own():
    activity = Activity()
    activity.sent([Sent((0, n), 1 + n % 2, n, n + 5, 16, 64) for n in range(4)])
    spans = list(spans_of("p", activity.tracks(), ["p", "a", "b"]))
    assert [span.to for span in spans] == ["a", "a", "b", "b"]
    assert all(span.figures == {"tokens": 16, "bytes": 64} for span in spans)


@pytest.mark.parametrize("num_steps", [7, 8, 9, 100, 1001])
def test_a_full_track_is_told_more_coarsely_and_loses_nothing(num_steps):
    activity = Activity(max_spans=8)
    for n in range(num_steps):
        activity.step(ScheduledBatch([request(5, 5)], [1]), 10 * n, 10 * n + 7)
    spans = list(spans_of("a", activity.tracks(), []))
    assert len(spans) <= 8 and sum(span.count for span in spans) == num_steps
    assert sum(span.figures["decode_tokens"] for span in spans) == num_steps
    assert spans[0].start_s == 0 and spans[-1].end_s == (10 * num_steps - 3) / 1e9
    assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(spans))


def test_transfers_that_are_told_as_one_began_with_the_first_of_them():
    activity = Activity(max_spans=2)
    activity.sent([Sent((0, 1), 1, 20, 30, 16, 64), Sent((0, 0), 1, 10, 40, 16, 64), Sent((0, 2), 1, 40, 50, 16, 64)])
    spans = list(spans_of("p", activity.tracks(), ["p", "d"]))
    assert [(span.start_s * 1e9, span.end_s * 1e9, span.count) for span in spans] == [(10, 40, 2), (40, 50, 1)]


@pytest.mark.parametrize("max_spans", [100, 8, 2])
def test_of_a_step_that_goes_on_after_an_end_only_the_rest_is_late(max_spans):
    activity = Activity(max_spans)
    for n in range(20):
        activity.step(ScheduledBatch([request(5, 5)], [1]), 10 * n, 10 * n + 7)
    activity.sent([Sent((0, 0), 1, 0, 500, 16, 64)])
    late = [steps_outside_ns(activity.tracks(), 0, end_ns) for end_ns in range(210)]
    assert late[0] == 20 * 7 and set(late[197:]) == {0}
    assert late == sorted(late, reverse=True)
    assert all(20 * 7 - late_ns <= end_ns for end_ns, late_ns in enumerate(late)), "busy no longer than there was time"
    if max_spans == 100:
        assert (late[193], late[187], late[180], late[178]) == (4, 7, 14, 14)


@pytest.mark.parametrize("max_spans", [100, 8, 2])
def test_of_steps_that_an_edge_cuts_only_the_part_within_counts(max_spans):
    activity = Activity(max_spans)
    for n in range(20):
        activity.step(ScheduledBatch([request(5, 5)], [1]), 10 * n, 10 * n + 7)
    for since_ns, until_ns in itertools.combinations_with_replacement(range(0, 210, 3), 2):
        within_ns = 20 * 7 - steps_outside_ns(activity.tracks(), since_ns, until_ns)
        exact_ns = sum(max(min(10 * n + 7, until_ns) - max(10 * n, since_ns), 0) for n in range(20))
        assert exact_ns <= within_ns <= until_ns - since_ns, "busy no longer than there was time"
        assert max_spans < 100 or within_ns == exact_ns


def test_a_track_of_fewer_than_two_spans_is_refused():
    with pytest.raises(ValueError, match="max_spans=1: expected an integer >= 2"):
        Activity(max_spans=1)


@pytest.mark.parametrize("words", [
    ["cluster=1p1d", "mode=pd_caching_2", "granularity=by_layer"],
    ["cluster=1p1d", "mode=pd_caching_2", "granularity=by_request"],
    ["cluster=colocated_2", "policy=prompt_tree_bounded", "fetch=always"],
    ["cluster=colocated_1", "preemption=swap"],
], ids=lambda words: words[-1])  # fmt: skip
def test_every_swapped_block_is_paid_for_by_a_step_whoever_it_was_swapped_for(words):
    """For a peer, for a request that waits for a grant, or for one that was preempted, too."""
    tiers = ["kvcache.num_hbm_blocks=80", "kvcache.num_dram_blocks=400", "cost_model.swap_block_s=1"]
    load = ["workload=synthetic", "workload.num_sessions=24", "workload.num_turns=3", "workload.rate=4",
            "workload.prompt_tokens=120", "workload.max_output_tokens=30"]  # fmt: skip
    result = LocalCluster(load_config(["exec=simulated", *load, *tiers, *words])).run_once()
    for row in result.report["instances"]:
        steps = [span for span in result.activity if not span.to and span.instance == row["id"]]
        num_swapped = sum(span.figures["swapped_blocks"] for span in steps)
        assert num_swapped == row["num_swapped_out_blocks"] + row["num_swapped_in_blocks"] > 0
        assert num_swapped <= row["busy_s"] <= 1.1 * num_swapped


def test_what_is_computed_anew_after_a_preemption_is_prefill():
    load = ["workload=synthetic", "workload.num_sessions=16", "workload.rate=20", "workload.prompt_tokens=64",
            "workload.max_output_tokens=300", "kvcache.num_hbm_blocks=50"]  # fmt: skip
    result = LocalCluster(load_config(["exec=simulated", *load])).run_once()
    figures = [span.figures for span in result.activity]
    num_decode, (row,) = sum(f["decode_tokens"] for f in figures), result.report["instances"]
    assert row["preemptions"] > 0
    assert sum(f["prefill_tokens"] for f in figures) == row["num_computed"]
    assert num_decode <= row["num_generated"] <= num_decode + 16 + row["preemptions"]


def test_a_runs_activity_adds_up_to_its_report(tmp_path):
    result = LocalCluster(load_config([*SIMULATED, "cluster=1p1d", "mode=pd_caching_3"])).run_once()
    report, steps = result.report, [span for span in result.activity if not span.to]
    assert {span.instance for span in steps} == {"prefill-0", "decode-1"}
    for row in report["instances"]:
        own = [span for span in steps if span.instance == row["id"]]
        assert sum(span.end_s - span.start_s for span in own) == pytest.approx(row["busy_s"])
        assert sum(span.count for span in own) == row["num_steps"]
    for sender, way in (("prefill-0", "p_to_d"), ("decode-1", "d_to_p")):
        sent = [span.figures for span in result.activity if span.to and span.instance == sender]
        assert sum(figures["bytes"] for figures in sent) == report["transfers"][way]["bytes"] > 0
        assert sum(figures["tokens"] for figures in sent) == report["transfers"][way]["tokens"]
    (tmp_path / "activity.jsonl").write_text("".join(activity_lines(result.activity)))
    assert load_activity(tmp_path) == result.activity
