"""Instances that die or stop in a running cluster: right answers or named failures, and nothing left behind."""

import functools

import pytest
from cluster.playing import play, tokens_of

from memserve import LocalCluster, load_config
from memserve.request import FinishReason

WORKLOAD = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=6", "workload.num_turns=2",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=10", "workload.rate=300",
    "transfer.retry_s=0.05", "transfer.deadline_s=0.5", "transfer.patience_s=5", "link.gb_per_s=0.001",
]  # fmt: skip
CLUSTERS = {
    "1p2d": ["cluster=1p2d", "mode=pd_caching_3"],
    "2p1d": ["cluster=2p1d", "mode=pd_caching_3"],
    "1p1d": ["cluster=1p1d", "mode=pd_basic"],
    "2p2d": ["cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_2"],
    "colocated_2": ["cluster=colocated_2"],
}


@functools.cache
def local(*words):
    return LocalCluster(load_config([*WORKLOAD, *words]))


@functools.cache
def expected():
    return tokens_of(play(local("cluster=colocated_1", "index=none").cluster()))


def assert_right(timelines, failures):
    for timeline in timelines:
        if timeline.succeeded:
            assert timeline.token_ids.tolist() == expected()[timeline.request_id]
        else:
            assert timeline.reason in failures and timeline.detail


def nothing_is_left(cluster):
    for node in cluster.nodes:
        if node.is_gone:
            continue
        node.instance.check()
        assert not node.instance.num_unfinished
        assert [h for h in node.instance.pool.allocator.holders() if h != ("index",)] == []
        if node.instance.handoffs is not None:
            assert node.instance.handoffs.transfers.num_open == 0


def lost(after_events, labels):
    def crash(cluster, number):
        if number == after_events:
            for label in labels:
                cluster.crash(label)

    return crash


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize(
    ("name", "victim"),
    [("1p2d", "decode-1"), ("1p2d", "decode-2"), ("2p1d", "prefill-0"), ("2p1d", "prefill-1"), ("2p2d", "decode-3")],
)
def test_one_of_several_may_die_at_any_moment_and_every_request_is_answered(name, victim, granularity):
    system = local(*CLUSTERS[name], f"granularity={granularity}")
    for after_events in range(2, 160, 17):
        cluster = system.cluster()
        timelines = play(cluster, lost(after_events, [victim]))
        assert len(timelines) == len(expected())
        assert_right(timelines, ())
        nothing_is_left(cluster)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_one_of_each_role_may_die_one_after_the_other(granularity):
    """What an earlier attempt had generated does not mean that this one has left its prefill instance."""
    system = local(*CLUSTERS["2p2d"], f"granularity={granularity}", "policy=round_robin")
    for first in range(10, 110, 12):
        cluster = system.cluster()

        def act(cluster, number, first=first):
            if number == first:
                cluster.crash("decode-2")
            if number == first + 9:
                cluster.crash("prefill-1")

        timelines = play(cluster, act)
        assert len(timelines) == len(expected())
        assert_right(timelines, ())
        nothing_is_left(cluster)


def test_a_colocated_instance_that_dies_is_replaced_by_the_other():
    system = local(*CLUSTERS["colocated_2"], "policy=round_robin")
    for after_events in range(2, 80, 11):
        cluster = system.cluster()
        timelines = play(cluster, lost(after_events, ["colocated-1"]))
        assert_right(timelines, ())
        nothing_is_left(cluster)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-1"])
def test_without_the_only_instance_of_a_role_requests_fail_by_name(victim):
    system = local(*CLUSTERS["1p1d"])
    num_failed = 0
    for after_events in range(2, 120, 17):
        cluster = system.cluster()
        timelines = play(cluster, lost(after_events, [victim]))
        assert_right(timelines, (FinishReason.INSTANCE_LOST,))
        failed = [t for t in timelines if not t.succeeded]
        assert all(victim in t.detail or "is left" in t.detail for t in failed)
        num_failed += len(failed)
        nothing_is_left(cluster)
    assert num_failed


def test_a_request_fails_rather_than_starting_again_if_so_configured():
    cluster = local(*CLUSTERS["1p2d"], "transfer.on_failure=fail").cluster()
    timelines = play(cluster, lost(40, ["decode-1"]))
    assert_right(timelines, (FinishReason.INSTANCE_LOST,))
    assert all(t.attempt == 0 for t in timelines) and any(not t.succeeded for t in timelines)


@pytest.mark.parametrize("granularity", ["by_layer", "packed"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-1"])
@pytest.mark.parametrize("ends", ["it goes on", "it dies"])
def test_an_instance_may_stop_at_any_moment_and_go_on_or_die(granularity, victim, ends):
    """Two seconds are longer than the deadline of a transfer: what was given up is still written afterwards."""
    system = local(*CLUSTERS["1p2d"], f"granularity={granularity}")
    for after_events in range(3, 150, 21):
        cluster = system.cluster()
        stopped_ns = []

        def act(cluster, number, after_events=after_events, stopped_ns=stopped_ns):
            if number == after_events:
                cluster.stop(victim)
                stopped_ns.append(cluster.now_ns)
                cluster.call_at(cluster.now_ns + 2_000_000_000, lambda: wake(cluster))

        def wake(cluster):
            if ends == "it dies":
                cluster.crash(victim)
            else:
                cluster.resume(victim)

        timelines = play(cluster, act)
        assert stopped_ns
        assert_right(timelines, (FinishReason.INSTANCE_LOST, FinishReason.TRANSFER_FAILED))
        nothing_is_left(cluster)
        assert all(h[0] != "quarantine" for n in cluster.nodes for h in n.instance.pool.allocator.holders())
