"""The control plane in virtual time: latency of messages, a global scheduler that routes one request at a time."""

import functools

import numpy as np
import pytest
from cluster.playing import tokens_of

from memserve.cluster.control import RoutingServer
from memserve.cluster.local import LocalCluster
from memserve.compose import load_config

ONE = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=1", "workload.think_time_s=0",
    "workload.prompt_tokens=100", "workload.max_output_tokens=5", "workload.rate=1000",
]  # fmt: skip
BUSY = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=12", "workload.num_turns=3",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=40", "workload.rate=100",
    "workload/lengths=uniform", "link.gb_per_s=0.001", "transfer.retry_s=0.05", "transfer.deadline_s=0.5",
]  # fmt: skip
COSTLY = ["control.latency_s=0.003", "control.request_s=0.0071"]
CLUSTERS = {
    "colocated": ["cluster=colocated_2", "policy=least_load"],
    "caching 3": ["cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_3", "policy=prompt_tree"],
}
THINKING = {"never": "workload.think_time_s=0", "a little": "workload.think_time_s=0.013"}


def played(*words, prepare=lambda cluster: None):
    system = LocalCluster(load_config(list(words)))
    cluster = system.cluster()
    prepare(cluster)
    return system.play(cluster)


def rows(result):
    return [
        (t.request_id, t.instance, t.dispatched_ns, t.finished_ns, t.token_ids.tolist(), t.token_times_ns.tolist(),
         t.stats, t.reason, t.attempt)
        for t in result.timelines
    ]  # fmt: skip


def figures(result):
    return {key: value for key, value in result.report.items() if key != "wall_s"}


def test_each_way_takes_the_latency_and_routing_its_time():
    (free,), (slow,) = (played(*ONE, *words).timelines for words in ([], COSTLY))
    assert slow.arrival_ns == free.arrival_ns
    assert slow.dispatched_ns - free.dispatched_ns == 3_000_000 + 7_100_000
    assert slow.stats.queued_ns - free.stats.queued_ns == 2 * 3_000_000 + 7_100_000
    there_and_back_ns = 4 * 3_000_000 + 7_100_000
    assert (slow.token_times_ns - free.token_times_ns == there_and_back_ns).all()
    assert slow.finished_ns - free.finished_ns == there_and_back_ns and slow.finished_ns == slow.token_times_ns[-1]


def test_costs_of_zero_change_nothing_and_say_nothing():
    words = [*BUSY, *CLUSTERS["caching 3"], "workload.think_time_s=0"]
    plain, zero = (played(*words, *more) for more in ([], ["control.latency_s=0", "control.request_s=0.0"]))
    assert rows(plain) == rows(zero) and plain.report["control"] is zero.report["control"] is None


def test_who_comes_while_another_is_routed_waits_and_the_report_says_how_long():
    burst = [*ONE, "workload.num_sessions=5", "workload.rate=1e8", "control.request_s=1"]
    result = played(*burst)
    dispatched = [t.dispatched_ns for t in result.timelines]
    assert np.diff(dispatched).tolist() == [1_000_000_000] * 4
    control = result.report["control"]
    assert control["busy_s"] == 5 and control["utilisation"] == pytest.approx(5 / result.report["makespan_s"])
    assert control["wait_s"]["p50"] == pytest.approx(2, abs=1e-6)
    assert result.report["ttft_s"]["p50"] > 3, "the queue of the global scheduler is a part of TTFT"


def test_an_answer_waits_for_the_requests_before_it_and_goes_before_one_of_its_own_nanosecond():
    server = RoutingServer(10)
    assert [server.route(arrives_ns) for arrives_ns in (100, 105, 130)] == [110, 120, 140]
    assert [server.passes(ns) for ns in (99, 100, 101, 105, 106, 119, 120, 130, 131, 141)] == [
        99, 100, 110, 110, 120, 120, 120, 130, 140, 141
    ]  # fmt: skip
    assert server.busy_ns == 30 and server.waits_s().tolist() == [0, 5e-9, 0]


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("costs", [COSTLY, COSTLY[:1], COSTLY[1:]])
def test_macro_steps_change_nothing_with_any_costs(name, thinking, costs):
    words = [*BUSY, *CLUSTERS[name], THINKING[thinking], *costs]
    macro, single = (played(*words, f"macro_steps={on}") for on in ("true", "false"))
    assert rows(macro) == rows(single) and figures(macro) == figures(single)
    assert macro.report["num_failed"] == 0


@pytest.mark.parametrize("then", ["crash", "resume"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_macro_steps_change_nothing_where_an_instance_ends_with_words_on_their_way(name, then):
    label = "colocated-0" if name == "colocated" else "decode-3"

    def prepare(cluster):
        cluster.call_at(333_000_000, functools.partial(cluster.stop if then == "resume" else cluster.crash, label))
        if then == "resume":
            cluster.call_at(555_000_000, functools.partial(cluster.resume, label))

    words = [*BUSY, *CLUSTERS[name], THINKING["never"], *COSTLY]
    macro, single = (played(*words, f"macro_steps={on}", prepare=prepare) for on in ("true", "false"))
    assert rows(macro) == rows(single)
    assert all(t.succeeded for t in macro.timelines)
    assert any(t.attempt for t in macro.timelines) == (then == "crash")


@pytest.mark.parametrize("name", CLUSTERS)
def test_answers_are_the_same_where_instances_come_go_and_crash_far_from_the_global_scheduler(name):
    role = "colocated" if name == "colocated" else "decode"
    last = 1 if name == "colocated" else 3
    changes = [f"{{at_s: 0.05, add: {role}}}", f"{{at_s: 0.11, drain: {role}-{last}}}",
               f"{{at_s: 0.2, crash: {role}-{last - 1}}}", f"{{at_s: 0.3, add: {role}}}"]  # fmt: skip
    words = [*BUSY, *CLUSTERS[name], THINKING["a little"], "control.latency_s=0.02", "control.request_s=0.001",
             "scaling=schedule", f"scaling.changes=[{','.join(changes)}]", "departure=migrate"]  # fmt: skip
    expected = tokens_of(played(*BUSY, THINKING["a little"]).timelines)
    result = played(*words)
    assert tokens_of(result.timelines) == expected
    assert result.report["num_failed"] == 0 and result.report["membership"]["lost"] == 1


def test_two_crashes_of_one_instance_before_the_first_is_heard_of_are_one():
    def prepare(cluster):
        for time_ns in (200_000_000, 201_000_000):
            cluster.call_at(time_ns, functools.partial(cluster.crash, "colocated-0"))

    result = played(*BUSY, *CLUSTERS["colocated"], THINKING["never"], "control.latency_s=0.01", prepare=prepare)
    assert result.report["membership"]["lost"] == 1 and result.report["num_failed"] == 0
