"""Figures of classes: each request counts for its own class, within that class's objectives."""

import itertools
import json

import pytest

from memserve import LocalCluster, load_config
from memserve.metrics.comparison import comparison_rows
from memserve.metrics.formulas import Slo
from memserve.metrics.repeats import mean_of
from memserve.metrics.report import InstanceStats, build_report
from memserve.metrics.tracking import flatten_figures
from memserve.request import FinishReason

INSTANCES = [InstanceStats("colocated-0", "colocated", 0)]
CLASSES = {"chat": Slo(ttft_s=3.0), "batch": Slo(), "nobody": Slo(tpot_s=1.0)}


@pytest.fixture
def timelines(make_timeline):
    """Two of chat, one late; one of batch, as late, and one that was refused; one of none."""
    late = (4.0, 5.0)
    made = [
        make_timeline("a/0"), make_timeline("b/0", token_times=late), make_timeline("c/0", token_times=late),
        make_timeline("d/0", token_times=(), reason=FinishReason.REFUSED), make_timeline("e/0", token_times=late),
    ]  # fmt: skip
    for timeline, name in zip(made, ("chat", "chat", "batch", "batch", ""), strict=True):
        timeline.class_name = name
    return made


def test_each_request_is_held_to_the_objectives_of_its_class(timelines):
    report = build_report(timelines, INSTANCES, wall_s=1.0, slo=Slo(ttft_s=3.9), classes=CLASSES)
    goodput, classes = report["goodput"], report["classes"]
    assert (goodput["num_good"], goodput["share"], goodput["missed"]["ttft_s"]) == (2, 0.4, 2)
    assert list(classes) == ["chat", "batch", "nobody"]
    assert [c["num_requests"] for c in classes.values()] == [2, 2, 0]
    assert [c["num_finished"] for c in classes.values()] == [2, 1, 0]
    assert classes["chat"]["goodput"] == {
        "slo": {"ttft_s": 3.0, "tpot_s": None, "itl_s": None, "jct_s": None},
        "num_good": 1,
        "share": 0.5,
        "requests_per_s": 0.2,
        "missed": {"ttft_s": 1, "tpot_s": 0, "itl_s": 0, "jct_s": 0},
    }
    assert classes["batch"]["goodput"] is None and classes["nobody"]["goodput"]["share"] is None
    assert [c["ttft_s"]["mean"] for c in classes.values()] == [3.0, 4.0, None]
    assert classes["batch"]["jct_s"]["p99"] == 5.0
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_without_classes_there_are_no_figures_of_any(timelines):
    report = build_report(timelines, INSTANCES, wall_s=1.0)
    assert report["classes"] is None and report["goodput"] is None


def test_goodput_of_all_is_there_where_a_class_alone_has_objectives(timelines):
    report = build_report(timelines, INSTANCES, wall_s=1.0, classes=CLASSES)
    assert (report["goodput"]["num_good"], report["goodput"]["slo"]["ttft_s"]) == (3, None)


def test_classes_are_averaged_compared_and_tracked_like_all_figures(timelines):
    reports = [build_report(t, INSTANCES, wall_s=1.0, classes=CLASSES) for t in (timelines, timelines[:1])]
    mean = mean_of(reports, [0, 1])
    assert mean["classes"]["chat"]["goodput"]["share"] == 0.75 and mean["classes"]["batch"]["num_requests"] == 1
    rows = {label: cells for label, *cells in comparison_rows({"mean": mean, "first": reports[0]})}
    assert rows["chat: good answers"] == ["75.0 % (50.0 % .. 100.0 %)", "50.0 %"]
    assert rows["batch: TTFT mean"][1] == "4.00 s" and "batch: good answers" not in rows
    assert dict(flatten_figures(mean))["classes/chat/ttft_s/mean"] == 2.5


STALLS = {  # what keeps an answer waiting between two tokens, and how long the rest of its gaps are at most
    "preemption": ["kvcache.num_hbm_blocks=40", "index=none"],
    "a long prompt beside it": ["workload.prompt_tokens=2000", "workload.rate=6"],
    "migration": ["cluster=colocated_2", "policy=session_affinity", "rebalancing=by_answers", "workload.rate=100",
                  "link.gb_per_s=0.0001"],
    "hand-off": ["cluster=1p1d", "mode=pd_basic", "link.gb_per_s=0.0001"],
}  # fmt: skip


@pytest.mark.parametrize("stall", STALLS)
def test_whatever_keeps_an_answer_waiting_between_two_tokens_misses_the_objective_on_gaps(stall, tmp_path):
    load = ["exec=simulated", "workload=synthetic", "workload.num_sessions=24", "workload.rate=20",
            "workload.prompt_tokens=64", "workload.max_output_tokens=80", "sched.chunk_size=null"]  # fmt: skip
    objectives = ["slo.itl_s=0.035", "slo.tpot_s=0.035"]
    report = LocalCluster(load_config([*load, *objectives, *STALLS[stall]])).run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    times = [record["token_times_s"] for record in records]
    longest = [max((b - a for a, b in itertools.pairwise(t)), default=0.0) for t in times]
    num_late = sum(gap_s > 0.035 for gap_s in longest)
    missed = report["goodput"]["missed"]
    assert missed["itl_s"] == num_late > missed["tpot_s"], "a mean hides it"
    assert report["max_itl_s"]["p99"] <= max(longest) + 1e-9
    assert [record["max_itl_s"] or 0.0 for record in records] == pytest.approx(longest)
