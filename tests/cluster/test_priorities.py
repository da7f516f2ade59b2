"""Requests of several classes on clusters: the same answers in every mode, priorities that go wherever a request goes,
and what the urgent gain and the others lose.
"""

import functools
import itertools

import numpy as np
import pytest
from cluster.playing import tokens_of
from cluster.survival import found_by

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.metrics.records import request_record
from memserve.sched.scaling import Drain
from memserve.transfer.faults import MessageFaults

CLASSES = "workload.classes=[{name: chat, share: .4, priority: -1, ttft_s: .2}, {name: batch, share: .6, priority: 3}]"
SESSIONS = [
    "workload=synthetic", "workload.num_sessions=12", "workload.num_turns=2", "workload.prompt_tokens=50",
    "workload.turn_tokens=15", "workload.prefix_tokens=24", "workload.share_ratio=2", "workload.max_output_tokens=20",
    "workload.think_time_s=0.05",
]  # fmt: skip
WORKLOAD = ["exec=simulated", *SESSIONS, "workload.rate=200"]
SCARCE = ["kvcache.block_size=4", "kvcache.num_hbm_blocks=60", "sched.decode_headroom_blocks=1"]
SWAP = ["preemption=swap", "kvcache.num_dram_blocks=60"]
CLUSTERS = {
    "colocated": ["cluster=colocated_2"],
    "prompts alone": ["cluster=colocated_2", "batching=prefill_first"],
    "chunks": ["cluster=colocated_1", "sched.chunk_size=8", "sched.token_budget=32"],
    "basic": ["cluster=1p1d", "mode=pd_basic", "granularity=by_layer"],
    "caching 1": ["cluster=1p2d", "mode=pd_caching_1", "batching=prefill_first"],
    "caching 2": ["cluster=2p1d", "mode=pd_caching_2", "granularity=packed"],
    "caching 3": ["cluster=1p2d", "mode=pd_caching_3", "granularity=by_layer", "sched.chunk_size=16"],
}
PREEMPTIONS = ["recompute", "swap", "swap beside"]


def local(*words):
    return LocalCluster(load_config([*WORKLOAD, CLASSES, "queue=priority", *words]))


@functools.cache
def expected():
    result = LocalCluster(load_config([*WORKLOAD, "cluster=colocated_1", "index=none"])).run_once()
    return tokens_of(result.timelines)


@functools.cache
def priorities():
    return {t.request_id: t.priority for t in local("cluster=colocated_1").run_once().timelines}


@pytest.mark.parametrize(
    ("name", "preemption"),
    [(name, PREEMPTIONS[(i + j) % 3]) for i, name in enumerate(CLUSTERS) for j in range(2)],  # each has two of three
)
def test_answers_are_the_same_in_every_mode_and_macro_steps_change_nothing(name, preemption):
    words = [*CLUSTERS[name], *SCARCE, *(SWAP if preemption != "recompute" else [])]
    words += ["kvcache.async_swap=true"] * (preemption == "swap beside")
    runs = [local(*words, f"macro_steps={on}").run_once() for on in ("true", "false")]
    assert all(tokens_of(run.timelines) == expected() for run in runs)
    macro, single = ({**run.report, "wall_s": 0} for run in runs)
    assert macro == single
    assert [request_record(t) for t in runs[0].timelines] == [request_record(t) for t in runs[1].timelines]
    assert set(priorities().values()) == {-1, 3} and macro["preemptions"] > 0


@pytest.mark.parametrize("words", [["cluster=1p1d", "mode=pd_caching_3"], ["cluster=colocated_1"]])
def test_a_real_model_gives_the_same_answers_whatever_the_priorities(words):
    emulated = ["exec=emulated", "step_time=model", "model=tiny", *SESSIONS, "workload.rate=200"]
    plain, classed = (
        LocalCluster(load_config([*emulated, *SCARCE, *words, *more])).run_once()
        for more in ([], [CLASSES, "queue=priority"])
    )
    assert tokens_of(plain.timelines) == tokens_of(classed.timelines)
    assert {t.priority for t in classed.timelines} == {-1, 3} and {t.priority for t in plain.timelines} == {0}


def test_a_priority_is_with_its_request_at_every_instance_wherever_it_is_sent_on_to():
    """Handed over, refused, redirected, migrated, served again after a crash."""
    words = ["cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_3", "scaling=schedule", *SCARCE]
    cluster = local(*words, "departure=migrate", "transfer.retry_s=0.05", "policy=least_load").cluster()
    cluster.faults = MessageFaults(np.random.default_rng(0), drop=0.1)
    cluster.call_at(80_000_000, lambda: cluster.change(Drain("decode-3")))
    cluster.call_at(250_000_000, lambda: cluster.crash("prefill-1"))
    seen_at = set()
    while cluster.advance():
        for node in cluster.nodes:
            for served in node.instance.served.values():
                assert served.request.priority == priorities()[served.request.request_id]
                seen_at.add(node.instance.label)
            if not node.is_gone:
                node.instance.check()
    timelines = list(cluster.scheduler.timelines.values())
    assert tokens_of(timelines) == expected() and len(seen_at) == 4
    assert any(t.migrations for t in timelines) and any(t.attempt for t in timelines)
    assert all(t.priority == priorities()[t.request_id] for t in timelines)


@pytest.mark.parametrize("name", ["colocated", "prompts alone", "caching 3"])
def test_the_urgent_wait_less_under_overload_and_the_others_pay_for_it(name):
    words = [*CLUSTERS[name], *SCARCE, "workload.num_sessions=40", "workload.num_turns=1", "sched.max_running=6"]
    fcfs, priority = (local(*words, f"queue={queue}").run() for queue in ("fcfs", "priority"))
    assert fcfs["num_failed"] == priority["num_failed"] == 0
    ttft = {
        (queue, name): report["classes"][name]["ttft_s"]["mean"]
        for (queue, report), name in itertools.product((("fcfs", fcfs), ("priority", priority)), ("chat", "batch"))
    }
    assert ttft["priority", "chat"] < 0.7 * ttft["fcfs", "chat"] and ttft["priority", "batch"] > ttft["fcfs", "batch"]
    shares = [report["classes"]["chat"]["goodput"]["share"] for report in (fcfs, priority)]
    assert shares[0] < shares[1]


def test_a_decode_instance_gives_room_to_the_urgent_first():
    words = ["cluster=1p1d", "mode=pd_basic", "kvcache.block_size=4", "+per_role.decode.kvcache.num_hbm_blocks=60"]
    words += ["workload.num_sessions=30", "workload.num_turns=1", "workload.max_output_tokens=40"]
    waits = {
        (queue, name): figures["phases_s"]["grant_wait"]["mean"]
        for queue in ("fcfs", "priority")
        for name, figures in local(*words, f"+queue@per_role.decode.queue={queue}").run()["classes"].items()
    }
    assert waits["priority", "chat"] < 0.5 * waits["fcfs", "chat"]
    assert waits["priority", "chat"] < 0.5 * waits["priority", "batch"]


@pytest.mark.timeout(300)  # real processes, beside whatever else the machine does
@pytest.mark.parametrize("transport", ["mapped", "gloo"])
def test_real_processes_give_the_same_answers_and_each_class_its_figures(transport, tmp_path):
    words = ["exec=distributed", "tokens=hash", f"transport={transport}", "model.num_threads=1", *SESSIONS]
    words += ["workload.rate=200", CLASSES, "queue=priority", *SCARCE, "cluster=1p2d", "mode=pd_caching_3"]
    cases = [[words, 4], [[*words, *SWAP, "granularity=by_layer", "batching=prefill_first"], 4]]
    for found in found_by(tmp_path, cases, 4, 280):
        assert found["tokens"] == expected()
        classes = found["report"]["classes"]
        assert {name: figures["num_finished"] for name, figures in classes.items()} == {
            name: list(priorities().values()).count(priority) for name, priority in (("chat", -1), ("batch", 3))
        }
        assert classes["chat"]["goodput"]["slo"]["ttft_s"] == 0.2 and classes["batch"]["goodput"] is None


RUSH = ["cluster=colocated_1", "workload.num_sessions=60", "workload.num_turns=1", "workload.rate=2000",
        "workload.prompt_tokens=300", "rejection=early"]  # fmt: skip


@pytest.mark.parametrize(
    ("objectives", "words", "refused"),
    [
        (("ttft_s: .2", "jct_s: 9"), [], ["chat"]),  # of batch nothing is predicted: it is never refused
        (("ttft_s: .2", "jct_s: 9"), ["slo.ttft_s=.2"], ["batch", "chat"]),  # what a class does not name is as slo says
        (("ttft_s: null", "ttft_s: .2"), ["slo.ttft_s=.2"], ["batch"]),
        (("tpot_s: null, ttft_s: 1000", "itl_s: 9"), ["slo.tpot_s=1e-4"], ["batch"]),
    ],
)
def test_early_rejection_holds_each_class_to_its_own_objectives(objectives, words, refused):
    classes = "workload.classes=[{{name: chat, share: .5, {}}}, {{name: batch, share: .5, {}}}]".format(*objectives)
    report = local(*RUSH, *words, classes).run()
    failed = {name: figures["num_requests"] - figures["num_finished"] for name, figures in report["classes"].items()}
    assert sorted(name for name, number in failed.items() if number) == refused
    assert report["failures"] == {"refused": sum(failed.values())}


def test_who_is_refused_by_a_class_s_objective_is_told_of_which():
    classes = "workload.classes=[{name: chat, share: 1, ttft_s: .2}]"
    refused = [t.detail for t in local(*RUSH, "slo.ttft_s=5", classes).run_once().timelines if not t.succeeded]
    assert refused and all(detail.endswith("expected within ttft_s=0.2 of class chat") for detail in refused)


def test_early_rejection_is_refused_where_no_class_has_an_objective_that_it_predicts():
    classes = (
        "workload.classes=[{name: chat, share: .5, jct_s: 1, ttft_s: null}, {name: batch, share: .5, ttft_s: null}]"
    )
    with pytest.raises(ConfigError, match=r"expected slo\.ttft_s= or slo\.tpot_s=, or a class with one of them"):
        local(*RUSH, "slo.ttft_s=1", "slo.itl_s=1", classes)
