"""Answers that go on at another instance when theirs is to leave: the same tokens, and nothing lost or left behind."""

import functools
import io

import numpy as np
import pytest
from cluster.playing import CLUSTERS, SLOW_LINK, at_random, nothing_is_left, play, rows_of, scheduled, tokens_of
from cluster.test_overtaking import LateWays
from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.messages import Cancel
from memserve.metrics.migrations import stood_still_s
from memserve.metrics.table import print_report
from memserve.request import FinishReason, Role
from memserve.sched.departures import Departure
from memserve.sched.scaling import Add, Drain
from memserve.transfer.faults import MessageFaults

WORKLOAD = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=6", "workload.num_turns=2",
    "workload.prompt_tokens=40", "workload.turn_tokens=20", "workload.max_output_tokens=30", "workload.rate=300",
    *SLOW_LINK,
]  # fmt: skip
ON_CALL = ["scaling=schedule"]  # of nothing: whoever drives the cluster says who leaves
MIGRATE = [*ON_CALL, "departure=migrate"]
SMALL = ["kvcache.block_size=4", "kvcache.num_hbm_blocks=48", "sched.decode_headroom_blocks=1"]
PRESSURE = {
    "roomy": [],
    "recompute": SMALL,
    "swap": [*SMALL, "preemption=swap", "kvcache.num_dram_blocks=64"],
    "swap beside": [*SMALL, "preemption=swap", "kvcache.num_dram_blocks=64", "kvcache.async_swap=true"],
}
TWO_EACH = "cluster.roles=[prefill,prefill,decode,decode]"
GRANULARITIES = ["by_layer", "by_request", "packed"]
MODES = {
    "basic": [TWO_EACH, "mode=pd_basic"],
    "caching 1": [TWO_EACH, "mode=pd_caching_1"],
    "caching 2": [TWO_EACH, "mode=pd_caching_2", "policy@decode_policy=least_load"],
    "caching 3": [TWO_EACH, "mode=pd_caching_3", "index_source=exact", "policy@decode_policy=prompt_tree_bounded"],
    "colocated": ["cluster=colocated_2", "policy=least_load"],
    "live, caching 3": [TWO_EACH, "mode=pd_caching_3", "migration=live"],
    "live, colocated": ["cluster=colocated_2", "policy=least_load", "migration=live"],
}
UNDER_PRESSURE = [  # what goes ahead has one way, and what becomes of its blocks here two
    (name, pressure) for name in MODES for pressure in PRESSURE
    if not name.startswith("live") or pressure in ("recompute", "swap beside")
]  # fmt: skip


@functools.cache
def local(*words):
    return LocalCluster(load_config([*WORKLOAD, *words]))


@functools.cache
def expected(*words):
    return tokens_of(play(local("cluster=colocated_1", "index=none", *words).cluster()))


def assert_answered(timelines, *words, attempts=(0,)):
    assert tokens_of(timelines) == expected(*words)
    assert all(t.succeeded and t.attempt in attempts for t in timelines)


def migrations_of(timelines):
    return [migration for timeline in timelines for migration in timeline.migrations]


def last_of(cluster):
    """An instance that others can stand in for: of the last role, the one that came last."""
    here = [m for m in cluster.members.members if m.standing == "serving"]
    return next((m.label for m in here[::-1] if sum(other.role == m.role for other in here) > 1), None)


def decoding_at(cluster, label):
    """Requests that an instance decodes now."""
    (instance,) = [node.instance for node in cluster.nodes if node.instance.label == label]
    return [request for request in instance.scheduler.running if request.num_generated]


def drained(moment):
    """The last instance drains, at the `moment`-th event at which it decodes."""
    num_seen = 0

    def act(cluster, number):
        nonlocal num_seen
        if (label := last_of(cluster)) is not None and decoding_at(cluster, label):
            num_seen += 1
            if num_seen == moment:
                cluster.change(Drain(label))

    return act


@pytest.mark.parametrize(("name", "pressure"), UNDER_PRESSURE)
def test_whenever_an_instance_drains_every_answer_is_the_same(name, pressure):
    """Where all are full nobody may have room, and the answers end where they are."""
    words, num_told, num_done, num_left = [*MODES[name], *PRESSURE[pressure], *MIGRATE], 0, 0, 0
    case = [*MODES].index(name) + [*PRESSURE].index(pressure)  # each has two of what follows
    for i in (case, case + 1):
        granularity, macro_steps = GRANULARITIES[i % 3], ["true", "false"][i % 2]
        cluster = local(*words, f"granularity={granularity}", f"macro_steps={macro_steps}").cluster()
        timelines = play(cluster, drained([1, 14, 27][i % 3]), check=i == case)
        assert_answered(timelines)
        nothing_is_left(cluster)
        num_left += cluster.members.counts()["left"]
        num_told += len(migrations_of(timelines))
        num_done += sum(migration.done for migration in migrations_of(timelines))
    assert num_left > 1 and num_told > 1 and (num_done > 1 or pressure != "roomy")


@pytest.mark.parametrize("name", CLUSTERS)
def test_whoever_comes_and_goes_every_request_is_answered_right(name):
    """Also who is migrated to may leave, switch its role, or be told to before anything has come."""
    num_done = 0
    for seed, granularity in enumerate(GRANULARITIES):
        cluster = local(*CLUSTERS[name], *MIGRATE, f"granularity={granularity}").cluster()
        timelines = play(cluster, at_random(seed, 0.1))
        assert_answered(timelines)
        nothing_is_left(cluster)
        num_done += sum(migration.done for migration in migrations_of(timelines))
    assert num_done > 8


LONGER = ("workload.max_output_tokens=80",)


def moving(cluster):
    """The labels of where answers migrate from and to now."""
    redirects, groups = cluster.scheduler._redirects, cluster.scheduler.groups
    for routed in redirects._moving.values():
        group, place = groups.decoding_at(routed)
        return group.labels[place.row], group.labels[routed.next_place.row]
    return None


THREE = {"caching 3": ["cluster.roles=[prefill,decode,decode,decode]", "mode=pd_caching_3"],
         "basic": ["cluster.roles=[prefill,decode,decode,decode]", "mode=pd_basic"],
         "colocated": ["cluster.roles=[colocated,colocated,colocated]"],
         "live": ["cluster.roles=[colocated,colocated,colocated]", "migration=live"]}  # fmt: skip


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("name", THREE)
def test_an_instance_may_die_at_any_moment_of_a_migration(name, victim):
    """Of one that is migrated to nothing is lost: the KV is still where it was, unless it had told that it came."""
    num_died = 0
    for moment in (1, 12):
        for later in range(0, 15, 3):
            granularity = GRANULARITIES[later // 3 % 3]
            cluster = local(*THREE[name], *MIGRATE, f"granularity={granularity}").cluster()
            seen, drain = [], drained(moment)

            def act(cluster, number, drain=drain, later=later, seen=seen):
                drain(cluster, number)
                seen += [] if seen or moving(cluster) is None else [number, *moving(cluster)]
                there = [m.label for m in cluster.members.members if m.standing is not None]
                label = seen[1 if victim == "source" else 2] if seen else ""
                if seen and number == seen[0] + later and label in there:
                    cluster.crash(label)

            timelines = play(cluster, act, check=later % 2 == 0)
            assert_answered(timelines, attempts=(0, 1))
            nothing_is_left(cluster)
            num_died += cluster.members.counts()["lost"]
    assert num_died > 6


@pytest.mark.parametrize("name", MODES)
def test_lost_and_repeated_messages_cost_time_alone(name):
    """A hand-off or migration whose ticket fails all the same is another attempt, or stays where it was."""
    num_done = 0
    for seed in range(4):
        granularity = GRANULARITIES[seed % 3]
        cluster = local(*MODES[name], *MIGRATE, f"granularity={granularity}").cluster()
        cluster.faults = MessageFaults(np.random.default_rng(seed), drop=0.25, repeat=0.2)
        timelines = play(cluster, drained(1 + 5 * seed))
        assert_answered(timelines, attempts=range(3))
        nothing_is_left(cluster)
        num_done += sum(migration.done for migration in migrations_of(timelines))
    assert num_done > 2


@pytest.mark.parametrize("name", ["caching 3", "basic", "colocated"])
def test_an_answer_that_reached_its_target_and_was_kept_nevertheless_is_told_once(name):
    """No `Inserted` comes through: the target has the request, its source says that it failed, and both go on."""
    num_failed = 0
    for moment in (2, 9):
        cluster = local(*THREE[name], *MIGRATE, *LONGER, "transfer.deadline_s=0.1").cluster()
        cluster.faults, drain, begun_ns = MessageFaults(np.random.default_rng(0)), drained(moment), []

        def times_ns(kind, due_ns, begun_ns=begun_ns):
            is_lost = kind == "Inserted" and begun_ns and due_ns < begun_ns[0] + 250_000_000
            return [] if is_lost else [due_ns]

        def act(cluster, number, drain=drain, begun_ns=begun_ns):
            drain(cluster, number)
            begun_ns.extend([cluster.now_ns] if not begun_ns and moving(cluster) else [])

        cluster.faults.times_ns = times_ns
        timelines = play(cluster, act)
        assert_answered(timelines, *LONGER, attempts=(0, 1, 2))  # of hand-offs, which take them for lost
        nothing_is_left(cluster)
        num_failed += sum(not migration.done for migration in migrations_of(timelines))
    assert num_failed > 0


@pytest.mark.parametrize("name", ["caching 3", "colocated"])
def test_an_instance_may_stop_in_the_middle_of_a_migration_and_go_on(name):
    """Longer than the deadline: what was given up is still written, and told, afterwards."""
    for victim in (1, 2):
        for later in range(0, 15, 5):
            cluster = local(*THREE[name], *MIGRATE).cluster()
            seen, drain = [], drained(4)

            def act(cluster, number, victim=victim, later=later, seen=seen, drain=drain):
                drain(cluster, number)
                seen += [] if seen or moving(cluster) is None else [number, *moving(cluster)]
                there = [m.label for m in cluster.members.members if m.standing is not None]
                if seen and number == seen[0] + later and seen[victim] in there:
                    cluster.stop(seen[victim])
                    resume = functools.partial(cluster.resume, seen[victim])
                    cluster.call_at(cluster.now_ns + 2_000_000_000, resume)

            timelines = play(cluster, act)
            assert_answered(timelines, attempts=(0, 1, 2))
            nothing_is_left(cluster)


@pytest.mark.parametrize("name", MODES)
def test_a_client_may_cancel_at_any_moment_of_a_migration(name):
    num_cancelled = 0
    for later in range(0, 21, 4):
        cluster = local(*MODES[name], *MIGRATE).cluster()
        seen, drain = [], drained(4)

        def act(cluster, number, later=later, seen=seen, drain=drain):
            drain(cluster, number)
            names = list(cluster.scheduler._redirects._moving)
            seen += [number, names[0]] if names and not seen else []
            if seen and number == seen[0] + later:
                cluster._to_scheduler(Cancel(seen[1]))

        timelines = play(cluster, act)
        for timeline in timelines:
            tokens = timeline.token_ids.tolist()
            assert tokens == expected()[timeline.request_id][: len(tokens)]
            assert timeline.succeeded or timeline.reason == FinishReason.ABORTED
        nothing_is_left(cluster)
        num_cancelled += sum(not timeline.succeeded for timeline in timelines)
    assert num_cancelled > 2


SCHEDULED = {
    "caching 3": [*THREE["caching 3"], *scheduled({"at_s": 0.1, "drain": "decode-3"})],
    "colocated": [*THREE["colocated"], *scheduled({"at_s": 0.1, "drain": "colocated-2"})],
}
LONG = ["workload.max_output_tokens=400", "workload.num_turns=1", "link.gb_per_s=1"]


def left_after_s(name, departure):
    cluster = local(*SCHEDULED[name], *LONG, f"departure={departure}").cluster()
    timelines = play(cluster)
    assert_answered(timelines, *LONG)
    (member,) = [m for m in cluster.members.members if m.ended_ns is not None]
    return member.ended_ns / 1e9 - 0.1


@pytest.mark.parametrize("name", SCHEDULED)
def test_an_instance_whose_answers_migrate_leaves_in_a_small_part_of_the_time(name):
    assert left_after_s(name, "migrate") < left_after_s(name, "wait") / 10


@pytest.mark.parametrize("name", SCHEDULED)
def test_two_runs_are_equal_to_the_nanosecond_and_macro_steps_change_nothing(name):
    words = [*SCHEDULED[name], "departure=migrate"]
    runs = [play(local(*words, f"macro_steps={on}").cluster()) for on in ("true", "true", "false")]
    assert sum(migration.done for migration in migrations_of(runs[0])) > 0
    assert rows_of(runs[0]) == rows_of(runs[1]) == rows_of(runs[2])


def test_an_answer_that_was_preempted_migrates_after_its_first_step_with_macro_steps_too():
    many = ["workload.num_sessions=15", "workload.num_turns=1", "workload.max_output_tokens=60", "workload.rate=1000"]
    small = ["kvcache.block_size=4", "kvcache.num_hbm_blocks=60", "policy=round_robin"]
    words = [*THREE["colocated"], *many, *small, *scheduled({"at_s": 0.1, "drain": "colocated-2"})]
    runs = [play(local(*words, "departure=migrate", f"macro_steps={on}").cluster()) for on in ("true", "false")]
    assert rows_of(runs[0]) == rows_of(runs[1])
    assert any(migration.done for migration in migrations_of(runs[0]))


def test_an_answer_that_waits_for_its_turn_leaves_at_once_and_keeps_nobody():
    """It came to an instance that is full, behind an answer that runs there, and is asked first when that drains."""
    drains = scheduled({"at_s": 0.1, "drain": "colocated-0"}, {"at_s": 0.15, "drain": "colocated-1"})
    long = ["workload.num_sessions=2", "workload.num_turns=1", "workload.max_output_tokens=500"]
    cluster = local(*THREE["colocated"], *drains, *long, "sched.max_running=1", "departure=migrate").cluster()
    timelines = play(cluster, check=True)
    assert_answered(timelines, *long)
    nothing_is_left(cluster)
    sources = [[m.source for m in timeline.migrations if m.done] for timeline in timelines]
    assert sources == [["colocated-0", "colocated-1"], ["colocated-1"]]
    assert all(m.ended_ns < 300_000_000 for m in cluster.members.members[:2])


def test_one_that_changes_its_role_hands_its_answers_on_and_comes_back():
    changes = scheduled({"at_s": 0.1, "switch": "decode-3", "to": "prefill"}, switch_s=0.01)
    cluster = local(*THREE["caching 3"], "departure=migrate", *changes).cluster()
    timelines = play(cluster)
    assert_answered(timelines)
    nothing_is_left(cluster)
    assert cluster.members.counts()["switched"] == 1 and any(m.done for m in migrations_of(timelines))


def test_the_report_says_how_many_migrated_and_how_long_they_stood_still():
    local_cluster = local(*SCHEDULED["caching 3"], *LONG, "departure=migrate")
    cluster = local_cluster.cluster()
    result = local_cluster.play(cluster)
    report, timelines = result.report, list(cluster.scheduler.timelines.values())
    figures, done = report["migrations"], [m for m in migrations_of(timelines) if m.done]
    assert figures["number"] == len(done) > 0 and figures["failed"] == len(migrations_of(timelines)) - len(done)
    assert figures["tokens"] == sum(m.num_tokens for m in done) > 0
    pauses_s = [pause_s for timeline in timelines for pause_s in stood_still_s(timeline)]
    assert figures["stood_still_s"] == {"mean": pytest.approx(np.mean(pauses_s)), "max": max(pauses_s)}
    assert report["transfers"]["between"]["tokens"] > 0
    for key in ("computed_in_vain", "generated_in_vain"):
        assert report["tokens"][key] == 0 and all(row["tokens"][key] == 0 for row in report["instances"])
    for metrics in (timeline.stats for timeline in timelines if timeline.migrations):
        assert metrics.queued_ns <= metrics.prefill_end_ns <= metrics.received_ns <= metrics.decode_scheduled_ns
    out = io.StringIO()
    print_report(report, console=Console(file=out, width=120))
    assert f"{len(done)}, " in next(line for line in out.getvalue().splitlines() if "migrations" in line)


class IfLong(Departure):
    """Those whose KV takes long to compute."""

    def moves(self, answer):
        return answer.num_prompt > 50


def test_a_departure_of_one_s_own_says_which_answers_migrate():
    words, moved = [*THREE["colocated"], *ON_CALL, "departure._target_=cluster.test_migration.IfLong"], []
    for moment in (1, 8, 20, 30):
        timelines = play(local(*words).cluster(), drained(moment))
        assert_answered(timelines)
        moved += [timeline.num_prompt for timeline in timelines if timeline.migrations]
    assert moved and min(moved) > 50


def test_a_departure_where_nobody_leaves_is_refused():
    with pytest.raises(ConfigError, match="departure contradicts scaling=fixed: nobody leaves"):
        load_config([*WORKLOAD, "departure=migrate"])


@pytest.mark.parametrize("victim", [None, "source", "target"])
@pytest.mark.parametrize("name", THREE)
def test_whatever_is_heard_first_answers_are_right(name, victim):
    """What an instance says of a migration may come after the target's tokens, or after that is gone."""
    for seed in range(3):
        cluster = local(*THREE[name], *MIGRATE, f"granularity={GRANULARITIES[seed % 3]}").cluster()
        LateWays(cluster, seed)
        seen, drain = [], drained(2 + 4 * seed)

        def act(cluster, number, seed=seed, seen=seen, drain=drain):
            drain(cluster, number)
            seen += [] if seen or moving(cluster) is None else [number, *moving(cluster)]
            there = [m.label for m in cluster.members.members if m.standing is not None]
            label = seen[1 if victim == "source" else 2] if seen and victim else ""
            if seen and number == seen[0] + 4 + 3 * seed and label in there:
                cluster.crash(label)

        timelines = play(cluster, act)
        assert_answered(timelines, attempts=(0, 1))
        nothing_is_left(cluster)


def test_nothing_is_given_back_to_who_had_left_before_the_next_target_came():
    words = [
        "exec=simulated", "workload=synthetic", "workload.num_sessions=1", "workload.prompt_tokens=40",
        "workload.max_output_tokens=60", "cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_3",
        *MIGRATE, "transfer.patience_s=.2", "transfer.retry_s=.05", "macro_steps=false",
    ]  # fmt: skip
    cluster = LocalCluster(load_config(words)).cluster()
    (group,) = [g for g in cluster.scheduler.groups.all if g.is_here("decode-2")]
    while not any(t.num_output > 3 for t in cluster.scheduler.timelines.values()):
        assert cluster.advance()
    (source,) = [label for label in group.labels if group.num_requests(label)]
    (stopped,) = set(group.labels) - {source}
    (prefill,) = [t.instance for t in cluster.scheduler.timelines.values()]
    cluster.stop(stopped)  # who is asked first does not answer
    cluster.change(Drain(source))
    (instance,) = [node.instance for node in cluster.nodes if node.instance.label == source]
    while not instance.handoffs.requests:
        assert cluster.advance()
    cluster.change(Drain(prefill))
    while cluster.members.members[int(prefill[-1])].ended_ns is None:
        assert cluster.advance()
    cluster.change(Add(Role.DECODE))
    cluster.call_at(cluster.now_ns + 10**9, lambda: cluster.resume(stopped))
    (timeline,) = play(cluster)
    nothing_is_left(cluster)
    assert timeline.succeeded and timeline.stats.decode_instance == "decode-4"
    (last,) = [node.instance for node in cluster.nodes if node.instance.label == "decode-4"]
    assert int(prefill[-1]) not in last.handoffs.transfers.counts_by_peer, "nobody is there"
