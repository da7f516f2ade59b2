"""Instances that join, drain, crash and change their role while a cluster runs: no answer changes, nothing is lost."""

import functools
import io

import numpy as np
import pytest
from cluster.playing import CLUSTERS, SLOW_LINK, at_random, nothing_is_left, play, rows_of, scheduled, tokens_of
from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.messages import Cancel, Submit, pack_tokens
from memserve.metrics.table import print_report
from memserve.request import FinishReason, Role
from memserve.sampling_params import SamplingParams
from memserve.sched.scaling import Add, ChangeRole, Crash, Drain, NoScaling

WORKLOAD = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=8", "workload.num_turns=3",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=12", "workload.rate=100",
    *SLOW_LINK,
]  # fmt: skip


@functools.cache
def local(*words):
    return LocalCluster(load_config([*WORKLOAD, *words]))


@functools.cache
def expected():
    return tokens_of(play(local("cluster=colocated_1", "index=none").cluster()))


def assert_answered(timelines):
    assert tokens_of(t for t in timelines if t.succeeded) == expected()


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_whoever_comes_and_goes_every_request_is_answered_right(name, granularity):
    system = local(*CLUSTERS[name], f"granularity={granularity}", "index_source=exact")
    num_changes = num_left = 0
    for seed in range(3):
        cluster, changes = system.cluster(), []
        timelines = play(cluster, at_random(seed, 0.12, changes=changes))
        assert_answered(timelines)
        nothing_is_left(cluster)
        num_changes += len(changes)
        num_left += cluster.members.counts()["left"]
        assert all(t.attempt == 0 for t in timelines), "no request is computed twice for who leaves"
    assert num_changes > 15 and num_left > 3


@pytest.mark.parametrize("name", CLUSTERS)
def test_some_crash_meanwhile_and_what_fails_says_so(name):
    system = local(*CLUSTERS[name], "granularity=by_layer")
    num_lost = 0
    for seed in range(3):
        cluster = system.cluster()
        for timeline in play(cluster, at_random(seed, 0.1, crash=0.02)):
            if timeline.succeeded:
                assert timeline.token_ids.tolist() == expected()[timeline.request_id]
            else:
                assert timeline.reason == FinishReason.INSTANCE_LOST and timeline.detail
        nothing_is_left(cluster)
        num_lost += cluster.members.counts()["lost"]
    assert num_lost > 4


BUSY = ["workload.num_sessions=20", "workload.rate=200"]


@functools.cache
def expected_when_busy():
    return tokens_of(play(local("cluster=colocated_1", "index=none", *BUSY).cluster()))


@pytest.mark.parametrize("name", ["caching 3", "colocated"])
def test_macro_steps_change_nothing_where_instances_come_and_go(name):
    role = "colocated" if name == "colocated" else "decode"
    first = 1 if name == "colocated" else 3
    changes = [{"at_s": 0.05, "add": role}, {"at_s": 0.11, "drain": f"{role}-{first}"}, {"at_s": 0.2, "add": role}]
    words = [*CLUSTERS[name], *BUSY, *scheduled(*changes, startup_s=0.03)]
    runs = [LocalCluster(load_config([*WORKLOAD, *words, f"macro_steps={on}"])).cluster() for on in ("true", "false")]
    macro, single = [rows_of(play(cluster)) for cluster in runs]
    assert macro == single
    assert [m.ended_ns for m in runs[0].members.members] == [m.ended_ns for m in runs[1].members.members]
    assert runs[0].members.counts() == {"joined": 2, "left": 1, "lost": 0, "switched": 0}


@pytest.mark.parametrize("then", ["crash", "resume"])
@pytest.mark.parametrize("name", ["caching 3", "colocated"])
def test_macro_steps_change_nothing_where_an_instance_stops_or_crashes_in_the_middle_of_one(name, then):
    """The client has the tokens of the steps that ended before, and of those alone."""
    label, runs = "colocated-0" if name == "colocated" else "decode-3", []
    for macro_steps in ("true", "false"):
        words = [*WORKLOAD, *CLUSTERS[name], "workload.max_output_tokens=40", f"macro_steps={macro_steps}"]
        cluster = LocalCluster(load_config(words)).cluster()
        cluster.call_at(333_000_000, functools.partial(cluster.stop if then == "resume" else cluster.crash, label))
        if then == "resume":
            cluster.call_at(555_000_000, functools.partial(cluster.resume, label))
        runs.append(rows_of(play(cluster)))
    assert runs[0] == runs[1]


def test_who_joins_gets_requests_once_it_has_started_and_who_drains_gets_no_more():
    changes = [{"at_s": 0.04, "add": "colocated"}, {"at_s": 0.1, "drain": "colocated-0"}]
    words = [*BUSY, *scheduled(*changes, startup_s=0.02), "cluster=colocated_2", "policy=least_load"]
    cluster = local(*words).cluster()
    timelines = play(cluster)
    first, _, new = cluster.members.members
    dispatched = {
        label: [t.dispatched_ns for t in timelines if t.instance == label] for label in cluster.members.labels
    }
    assert new.label == "colocated-2" and new.joined_ns == 60_000_000 <= min(dispatched["colocated-2"])
    assert max(dispatched["colocated-0"]) <= 100_000_000 < first.ended_ns
    finished = [t.finished_ns for t in timelines if t.instance == "colocated-0"]
    assert first.ended_ns == max(finished), "it leaves when its last request has ended"


def test_one_that_comes_back_in_another_role_has_a_new_name_and_an_empty_pool():
    changes = [{"at_s": 0.1, "switch": "decode-3", "to": "prefill"}]
    words = [*CLUSTERS["caching 3"], *BUSY, "policy=round_robin", *scheduled(*changes, switch_s=0.05)]
    cluster = local(*words).cluster()
    timelines = play(cluster)
    assert all(t.succeeded for t in timelines)
    old, new = cluster.members.members[3:]
    assert (new.label, new.role, new.joined_ns) == ("prefill-4", Role.PREFILL, old.ended_ns + 50_000_000)
    assert cluster.members.counts() == {"joined": 1, "left": 1, "lost": 0, "switched": 1}
    served = [t for t in timelines if t.instance == "prefill-4"]
    assert served and min(t.dispatched_ns for t in served) >= new.joined_ns
    assert [node.instance.label for node in cluster.nodes] == ["prefill-0", "prefill-1", "decode-2", "prefill-4"]


def test_a_drain_that_would_leave_nobody_waits_until_another_serves():
    changes = [{"at_s": 0.05, "add": "decode"}, {"at_s": 0.06, "drain": "decode-1"}]
    cluster = local("cluster=1p1d", "mode=pd_caching_2", *BUSY, *scheduled(*changes, startup_s=0.2)).cluster()
    timelines = play(cluster)
    assert all(t.succeeded for t in timelines)
    _, old, new = cluster.members.members
    assert new.joined_ns == 250_000_000 < old.ended_ns


def test_one_that_has_not_come_yet_may_be_sent_away_again():
    changes = [{"at_s": 0.05, "add": "colocated"}, {"at_s": 0.06, "drain": "colocated-2"}]
    cluster = local("cluster=colocated_2", *BUSY, *scheduled(*changes, startup_s=0.2)).cluster()
    assert all(t.succeeded for t in play(cluster))
    assert cluster.members.counts() == {"joined": 0, "left": 0, "lost": 0, "switched": 0}
    assert len(cluster.nodes) == 2


def test_what_has_crashed_may_be_replaced():
    """In between nobody decodes: what comes then fails by name."""
    changes = [{"at_s": 0.05, "crash": "decode-1"}, {"at_s": 0.05, "add": "decode"}]
    cluster = local("cluster=1p1d", "mode=pd_caching_3", *BUSY, *scheduled(*changes, startup_s=0.01)).cluster()
    timelines = play(cluster)
    failed = [t for t in timelines if not t.succeeded]
    assert failed and all(t.finished_ns < 60_000_000 and t.detail for t in failed)
    assert any(t.succeeded and t.dispatched_ns >= 60_000_000 for t in timelines)
    nothing_is_left(cluster)


def test_the_report_has_who_came_and_went_and_the_time_they_were_there():
    changes = [{"at_s": 0.1, "add": "colocated"}, {"at_s": 0.2, "drain": "colocated-0"},
               {"at_s": 0.3, "crash": "colocated-1"}]  # fmt: skip
    report = local("cluster=colocated_2", "policy=least_load", *BUSY, *scheduled(*changes)).run()
    assert [row["id"] for row in report["instances"]] == ["colocated-0", "colocated-2"]
    left, here = report["instances"]
    assert (left["joined_s"], here["joined_s"], here["left_s"]) == (0.0, 0.1, None) and left["left_s"] > 0.2
    assert 0 < left["utilisation"] <= 1 and 0 < here["utilisation"] <= 1
    membership = report["membership"]
    assert {key: membership[key] for key in ("joined", "left", "lost")} == {"joined": 1, "left": 1, "lost": 1}
    assert membership["instance_s"] < 3 * report["makespan_s"]
    out = io.StringIO()
    print_report(report, console=Console(file=out, width=120))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert any("1 joined, 1 left, 1 lost;" in line for line in lines)
    row = next(n for n, line in enumerate(lines) if line.startswith("colocated-2"))
    assert lines[row + 1] == "(from 100 ms)"


def test_several_runs_of_which_each_had_its_own_instances_are_one_report():
    words = ["scaling=by_load", "scaling.full.colocated=2", "scaling.max_instances=4", "scaling.interval_s=0.02"]
    report = local("cluster=colocated_1", *BUSY, *words, "seeds=2").run()
    assert report["seeds"] == [0, 1] and report["membership"]["joined"] > 0
    assert len({row["id"] for row in report["instances"]}) == len(report["instances"])


def test_changes_of_what_is_not_there_are_refused():
    cluster = local(*CLUSTERS["caching 3"]).cluster()
    for change, said in [
        (Drain("decode-9"), "instance 'decode-9' is not in the cluster: expected one of prefill-0"),
        (Add(Role.COLOCATED), "role colocated: expected one of the cluster's, decode, prefill"),
        (ChangeRole("decode-2", Role.COLOCATED), "role colocated: expected one"),
        (Crash("prefill"), "instance 'prefill' is not in the cluster"),
    ]:
        with pytest.raises(ValueError, match=said):
            cluster.change(change)
    busy = []
    while "decode-2" not in busy:
        cluster.advance()
        busy = [label for label, number in cluster.scheduler.loads().items() if number]
    cluster.change(Drain("decode-2"))
    with pytest.raises(ValueError, match="'decode-2' is to drain already"):
        cluster.change(Drain("decode-2"))
    assert_answered(play(cluster))
    assert [m.label for m in cluster.members.members if m.standing is None] == ["decode-2"]


def test_one_that_is_still_starting_can_neither_stop_nor_go_on():
    cluster = local("cluster=colocated_2", *scheduled({"at_s": 0, "add": "colocated"}, startup_s=5)).cluster()
    while len(cluster.members.members) < 3:
        cluster.advance()
    for act in (cluster.stop, cluster.resume):
        with pytest.raises(ValueError, match="'colocated-2' is starting: expected one that is there"):
            act("colocated-2")
        with pytest.raises(ValueError, match="'colocated-9' is not in the cluster: expected one of colocated-0"):
            act("colocated-9")


@pytest.mark.parametrize(
    "meanwhile", [(), (Crash("colocated-2"),), (Drain("colocated-2"),)], ids=["nothing", "crash", "drain"]
)
def test_one_that_crashes_while_it_starts_never_comes_though_the_global_scheduler_hears_of_it_late(meanwhile):
    """It would have come between the two, in which it may be told to crash once more, or to drain."""
    words = scheduled({"at_s": 0.01, "add": "colocated"}, {"at_s": 0.02, "crash": "colocated-2"}, startup_s=0.03)
    cluster = local("cluster=colocated_2", *words, "control.latency_s=0.1").cluster()
    for change in meanwhile:
        cluster.call_at(30_000_000, lambda change=change: cluster.change(change))
    assert_answered(play(cluster))
    assert [node.instance.label for node in cluster.nodes] == ["colocated-0", "colocated-1"]
    assert cluster.members.members[2].is_lost and cluster.members.counts()["joined"] == 0


def test_an_idle_instance_leaves_as_soon_as_it_is_to_drain():
    cluster = local("cluster=colocated_2").cluster()
    assert_answered(play(cluster))
    cluster.change(Drain("colocated-0"))
    assert [node.instance.label for node in cluster.nodes] == ["colocated-1"]


def test_by_load_adds_while_there_is_much_to_do_and_drains_when_there_is_not():
    words = ["scaling=by_load", "scaling.full.prefill=2", "scaling.full.decode=4", "scaling.max_instances=6",
             "scaling.interval_s=0.02", "scaling.startup_s=0.01", "scaling.window_s=0.1"]  # fmt: skip
    cluster = local(
        "cluster=1p1d", "mode=pd_caching_3", "workload.num_sessions=40", "workload.num_turns=4", *BUSY[1:], *words
    ).cluster()
    most = [0]

    def act(cluster, number):
        here = [m for m in cluster.members.members if m.standing is not None]
        most[0] = max(most[0], len(here))
        assert len(here) <= 6 and {"prefill", "decode"} <= {m.role for m in here}

    assert all(t.succeeded for t in play(cluster, act))
    counts = cluster.members.counts()
    assert most[0] > 3 and counts["left"] >= 2 and counts["lost"] == 0
    nothing_is_left(cluster)


def test_switch_roles_keeps_their_number_and_moves_who_is_needed_elsewhere():
    words = [
        "scaling=switch_roles",
        "scaling.full.prefill=1",
        "scaling.full.decode=30",
        "scaling.interval_s=0.02",
        "scaling.window_s=0.05",
    ]
    system = ["cluster.roles=[prefill,decode,decode,decode]", "mode=pd_caching_1", "workload.prompt_tokens=400"]
    cluster = local(*system, "workload.num_sessions=40", "workload.rate=400", *words).cluster()

    def act(cluster, number):
        assert sum(m.standing is not None for m in cluster.members.members) in (4, 5)  # a successor has its name before

    assert all(t.succeeded for t in play(cluster, act))
    assert cluster.members.counts()["switched"] >= 1
    nothing_is_left(cluster)


def test_by_load_replaces_who_has_crashed():
    """Meanwhile nobody serves: what comes then fails by name."""
    words = ["scaling=by_load", "scaling.interval_s=0.05", "scaling.startup_s=0.02", "cluster=colocated_1"]
    cluster = local(*BUSY, *words).cluster()
    cluster.call_at(20_000_000, lambda: cluster.crash("colocated-0"))
    timelines = play(cluster)
    lost, new = cluster.members.members
    assert lost.is_lost and new.joined_ns == 70_000_000
    assert all(t.succeeded or t.finished_ns <= 70_000_000 for t in timelines) and any(t.succeeded for t in timelines)
    nothing_is_left(cluster)


@pytest.mark.parametrize(("victim", "words"), [
    ("colocated-0", ["cluster=colocated_1"]),
    ("prefill-0", ["cluster=1p1d", "mode=pd_caching_3", "index_source=exact", "policy=prompt_tree"]),
    ("decode-1", ["cluster=1p1d", "mode=pd_caching_3", "granularity=by_layer"]),
])  # fmt: skip
def test_where_nobody_is_left_requests_wait_for_who_comes(victim, words):
    changes = [{"at_s": 0.05, "crash": victim}, {"at_s": 0.05, "add": victim.split("-")[0]}]
    words = [*words, *BUSY, *scheduled(*changes, startup_s=0.3)]
    cluster = local(*words, "cluster.patience_s=1").cluster()
    timelines = play(cluster)
    assert tokens_of(timelines) == expected_when_busy()
    waited = [t for t in cluster.scheduler.timelines.values() if 50_000_000 < t.arrival_ns < 350_000_000]
    assert waited and all(t.dispatched_ns >= 350_000_000 for t in waited)
    nothing_is_left(cluster)


def test_who_waits_for_an_instance_in_vain_fails_by_name_when_its_time_is_up():
    words = ["cluster=1p1d", "mode=pd_basic", *BUSY, *scheduled({"at_s": 0.05, "crash": "decode-1"})]
    cluster = local(*words, "cluster.patience_s=0.2").cluster()
    failed = [t for t in play(cluster) if not t.succeeded]
    assert failed
    for timeline in failed:
        assert timeline.reason == FinishReason.INSTANCE_LOST
        assert timeline.detail == "no decode instance is left, and none came within cluster.patience_s=0.2"
        assert timeline.finished_ns == max(timeline.arrival_ns, 50_000_000) + 200_000_000
    nothing_is_left(cluster)


def test_a_request_that_waits_for_an_instance_can_be_cancelled():
    scheduler = local("cluster=colocated_1", "cluster.patience_s=5").cluster().scheduler
    scheduler.instance_gone("colocated-0", 0)
    scheduler.receive(Submit("a", "s", pack_tokens(np.arange(9)), SamplingParams(max_tokens=2), 0), 0)
    assert scheduler.drain_outbox() == [] and scheduler.num_unfinished == 1
    scheduler.receive(Cancel("a"), 1)
    ((destination, finished),) = scheduler.drain_outbox()
    assert (destination, finished.reason) == ("client", "aborted") and scheduler.next_time_ns is None


def test_one_that_is_starting_changes_its_role_once_it_serves():
    changes = [{"at_s": 0.05, "add": "decode"}, {"at_s": 0.06, "switch": "decode-2", "to": "prefill"}]
    cluster = local("cluster=1p1d", "mode=pd_caching_2", *BUSY, *scheduled(*changes, startup_s=0.05)).cluster()
    assert all(t.succeeded for t in play(cluster))
    added, successor = cluster.members.members[2:]
    assert added.joined_ns == 100_000_000 <= added.ended_ns == successor.joined_ns


def test_a_drain_beside_a_crash_waits_for_who_replaces_it():
    changes = [
        {"at_s": 0.05, "add": "decode"},
        {"at_s": 0.06, "crash": "decode-1"},
        {"at_s": 0.06, "drain": "decode-2"},
    ]
    cluster = local("cluster=1p2d", "mode=pd_caching_2", *BUSY, *scheduled(*changes, startup_s=0.2)).cluster()
    assert all(t.succeeded for t in play(cluster))
    assert cluster.members.members[2].ended_ns > 250_000_000


def test_a_schedule_passes_over_who_was_lost_before():
    changes = [{"at_s": 0.06, "drain": "decode-1"}]
    cluster = local("cluster=1p2d", "mode=pd_caching_2", *BUSY, *scheduled(*changes)).cluster()
    cluster.call_at(50_000_000, lambda: cluster.crash("decode-1"))
    assert all(t.succeeded for t in play(cluster))
    assert cluster.members.counts()["lost"] == 1


def test_nobody_comes_after_the_last_request_has_ended():
    changes = [{"at_s": 0.05, "add": "colocated"}]
    cluster = local("cluster=colocated_1", *BUSY, *scheduled(*changes, startup_s=100)).cluster()
    play(cluster)
    assert cluster.members.counts()["joined"] == 0 and len(cluster.nodes) == 1


class NeverLater(NoScaling):
    def next_time_ns(self, last_ns):
        return 1000


class Murmurs(NoScaling):
    def next_time_ns(self, last_ns):
        return 1000 if last_ns is None else None

    def changes(self, loads, now_ns):
        return ["drain colocated-0"]


@pytest.mark.parametrize(("policy", "said"), [(NeverLater, "expected a later time"), (Murmurs, "expected Add, Drain")])
def test_what_a_policy_of_one_s_own_must_not_do_is_said(policy, said):
    cluster = local("cluster=colocated_2").cluster()
    cluster.members._scaling = policy()
    with pytest.raises(ValueError, match=f"{policy.__name__} .*{said}"):
        play(cluster)


def test_who_comes_while_a_crash_is_not_known_to_the_router_waits_for_nothing_from_who_crashed():
    words = scheduled({"at_s": 0.15, "crash": "colocated-0"}, {"at_s": 0.15, "add": "colocated"}, words=[
        "exec=simulated", "workload=synthetic", "workload.num_sessions=80", "workload.rate=400",
        "workload.prompt_tokens=40", "workload.prefix_tokens=64", "workload.share_ratio=20",
        "workload.max_output_tokens=4", "cluster=colocated_2", "fetch=always", "policy=least_load",
        "control.latency_s=.01",
    ])  # fmt: skip
    timelines = play(LocalCluster(load_config(words)).cluster())
    asked = [t.stats.fetch for t in timelines if t.instance == "colocated-2" and t.stats.fetch is not None]
    assert asked, "it is told who holds more"
    assert all(fetch.ended_ns is None or fetch.ended_ns - fetch.began_ns < 10**9 for fetch in asked)
