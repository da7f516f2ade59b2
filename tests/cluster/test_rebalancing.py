"""Answers that go on at another instance though theirs stays: the same tokens, and nothing lost or left behind."""

import functools

import numpy as np
import pytest
from cluster.playing import CLUSTERS, SLOW_LINK, at_random, nothing_is_left, play, rows_of, scheduled
from cluster.test_migration import (
    MODES,
    PRESSURE,
    THREE,
    UNDER_PRESSURE,
    WORKLOAD,
    assert_answered,
    expected,
    local,
    migrations_of,
)

from memserve import load_config
from memserve.config.errors import ConfigError
from memserve.messages import Cancel
from memserve.metrics.parts import instances_of
from memserve.request import FinishReason
from memserve.sched.rebalancing import Rebalancing
from memserve.sched.routing import Policy
from memserve.transfer.faults import MessageFaults

RESTLESS = "rebalancing._target_=cluster.test_rebalancing.Restless"


class Restless(Rebalancing):
    """Each time that it is asked, to the next row."""

    def target(self, source, cluster):
        return (source + 1) % len(cluster.labels) if len(cluster.labels) > 1 else None

    def key(self, answer):
        return (-answer.arrival_s,)


class Astray(Restless):
    def target(self, source, cluster):
        return source


class Unfair(Policy):
    """Four of five to the first instance."""

    def choose(self, request, cluster, rng):
        return 0 if cluster.num_routed % 5 else 1


def returned(timelines):
    """Requests that came back to an instance that they had left."""
    stays = [[m for m in timeline.migrations if m.done] for timeline in timelines]
    return sum(m.target in [before.source for before in stay[:i]] for stay in stays for i, m in enumerate(stay))


@pytest.mark.parametrize(("name", "pressure"), UNDER_PRESSURE)
def test_wherever_answers_go_they_are_the_same(name, pressure):
    """Where all are full nobody may have room, and they end where they are."""
    number = [*MODES].index(name) + [*PRESSURE].index(pressure)  # each meets each of what follows
    more = [
        f"granularity={['by_layer', 'by_request'][number % 2]}",
        f"macro_steps={['true', 'false'][number // 2 % 2]}",
    ]
    cluster = local(*MODES[name], *PRESSURE[pressure], RESTLESS, *more).cluster()
    timelines = play(cluster, check=number % 2 == 0)
    assert_answered(timelines)
    nothing_is_left(cluster)
    assert sum(migration.done for migration in migrations_of(timelines)) > 1 or pressure != "roomy"


@pytest.mark.parametrize("departure", ["wait", "migrate"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_whoever_comes_goes_and_dies_meanwhile_answers_are_right(name, departure):
    num_done = 0
    for seed in (0, 2):
        cluster = local(*CLUSTERS[name], "scaling=schedule", f"departure={departure}", RESTLESS).cluster()
        cluster.faults = MessageFaults(np.random.default_rng(seed), drop=0.1, repeat=0.1)
        timelines = play(cluster, at_random(seed, 0.08, crash=0.01))
        for timeline in timelines:
            tokens = timeline.token_ids.tolist()
            assert tokens == expected()[timeline.request_id][: len(tokens)]
            assert timeline.succeeded or timeline.reason in (FinishReason.INSTANCE_LOST, FinishReason.TRANSFER_FAILED)
        nothing_is_left(cluster)
        num_done += sum(migration.done for migration in migrations_of(timelines))
    assert num_done > 1


@pytest.mark.parametrize("name", ["caching 3", "colocated"])
def test_a_client_may_cancel_an_answer_that_is_on_its_way(name):
    num_cancelled = 0
    for moment in range(3, 30, 9):
        cluster = local(*THREE[name], RESTLESS).cluster()

        def act(cluster, number, moment=moment):
            moving = list(cluster.scheduler._redirects._moving)
            if moving and number % moment == 0:
                cluster._to_scheduler(Cancel(moving[0]))

        timelines = play(cluster, act)
        assert all(t.succeeded or t.reason == FinishReason.ABORTED for t in timelines)
        nothing_is_left(cluster)
        num_cancelled += sum(not timeline.succeeded for timeline in timelines)
    assert num_cancelled > 2


@pytest.mark.parametrize("name", ["caching 3", "colocated", "live, caching 3", "live, colocated"])
def test_a_real_model_s_answers_are_the_same_wherever_they_go_on(name):
    words = ["exec=emulated", "model=tiny", "step_time=model", "workload.max_output_tokens=40"]
    timelines = play(local(*MODES[name], *words, RESTLESS).cluster(), check=True)
    assert any(migration.done for migration in migrations_of(timelines))
    assert_answered(timelines, *words)


def test_answers_go_between_instances_of_several_ranks():
    words = ["tokens=workload", "geometry=llama3_8b", "cluster.tensor_parallel.every=4", "link.gb_per_s=100"]
    cluster = local(*MODES["colocated"], *words, RESTLESS).cluster()
    timelines = play(cluster, check=True)
    assert all(t.succeeded for t in timelines) and any(migration.done for migration in migrations_of(timelines))
    nothing_is_left(cluster)


RULES = {
    "always": [RESTLESS],
    "by room": ["rebalancing=by_room", "rebalancing.low=0.7", "rebalancing.high=0.7"],
    "by answers": ["rebalancing=by_answers", "rebalancing.gap=1", "policy=prompt_tree"],
    "slow control": [RESTLESS, "control.latency_s=0.001", "control.request_s=0.002"],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", THREE)
def test_two_runs_are_equal_to_the_nanosecond_and_macro_steps_change_nothing(name, rule):
    many = ["workload.num_sessions=12", "workload.prefix_tokens=32", "workload.share_ratio=3", "link.gb_per_s=1",
            "kvcache.num_hbm_blocks=28", "kvcache.block_size=16", "policy@decode_policy=random"]  # fmt: skip
    words = [*THREE[name], *many, *RULES[rule]]
    if "mode=pd_basic" in words and rule == "by answers":
        words.append("policy=least_load")  # nothing is cached there
    runs = [play(local(*words, f"macro_steps={on}").cluster()) for on in ("true", "true", "false")]
    assert sum(migration.done for migration in migrations_of(runs[0])) > 0
    assert rows_of(runs[0]) == rows_of(runs[1]) == rows_of(runs[2])


def test_an_answer_that_comes_back_is_counted_once_at_each_instance():
    long = ["workload.max_output_tokens=120", "link.gb_per_s=1"]
    for words in (MODES["colocated"], MODES["caching 3"], THREE["caching 3"]):
        system = local(*words, *long, RESTLESS)
        result = system.play(system.cluster())
        report, timelines = result.report, result.timelines
        assert returned(timelines) > 0
        assert sum(row["num_generated"] for row in report["instances"]) == sum(t.num_output for t in timelines)
        assert sum(row["num_computed"] for row in report["instances"]) == report["tokens"]["computed"]
        parts = sum(len(instances_of(timeline.stats)) for timeline in timelines)
        assert sum(row["num_requests"] for row in report["instances"]) == parts
        assert_answered(timelines, *long)


IMBALANCED = [
    "cluster=colocated_2", "policy._target_=cluster.test_rebalancing.Unfair", "workload.num_sessions=16",
    "workload.num_turns=1",
    "workload.max_output_tokens=200", "workload.rate=1000", "kvcache.block_size=4", "kvcache.num_hbm_blocks=360",
    "index=none", "index_source=none", "link.gb_per_s=10",
]  # fmt: skip


def test_where_one_instance_is_short_of_room_answers_that_go_where_there_is_some_end_sooner():
    none, by_room = (local(*IMBALANCED, *words).run() for words in ([], ["rebalancing=by_room", "rebalancing.low=0.2"]))
    assert none["migrations"]["number"] == 0 < by_room["migrations"]["number"]
    assert by_room["jct_s"]["mean"] < none["jct_s"]["mean"]
    assert by_room["jct_s"]["p99"] < 0.9 * none["jct_s"]["p99"]


def test_answers_that_go_where_there_is_less_to_do_take_what_is_cached_with_them():
    """Whoever routes by the longest prefix alone sends all to one: a few migrations spread its prefix, too."""
    words = ["cluster=colocated_4", "policy=prompt_tree", "index_source=exact", "workload.prefix_tokens=256",
             "workload.share_ratio=24", "workload.num_sessions=24", "workload.num_turns=4", "workload.rate=20",
             "workload.max_output_tokens=60", "link.gb_per_s=10", "cost_model.decode_token_s=0.003"]  # fmt: skip
    none, by_answers = (local(*words, *rule).run() for rule in ([], ["rebalancing=by_answers"]))
    assert none["skew"]["num_requests"] == 4 and by_answers["skew"]["num_requests"] < 2
    assert by_answers["jct_s"]["mean"] < 0.9 * none["jct_s"]["mean"]
    assert by_answers["hit_ratio"] > 0.98 * none["hit_ratio"]


def test_who_had_no_room_is_not_asked_again_before_it_has_said_how_much_it_has():
    """Each that is declined stands still for it."""
    words = [*THREE["colocated"], *PRESSURE["recompute"], "workload.num_sessions=12", "policy=round_robin", RESTLESS]
    cluster, asked = local(*words).cluster(), []
    redirects = cluster.scheduler._redirects
    said = redirects.has_room

    def has_room(label, live, now_ns):
        full = redirects._full - {label}
        sent = said(label, live, now_ns)
        asked.extend([(full, redirects._next_label(routed)) for routed in redirects._moving.values()] if sent else [])
        return sent

    redirects.has_room = has_room
    timelines = play(cluster)
    assert_answered(timelines, "workload.num_sessions=12")
    assert any(full for full, _ in asked) and all(target not in full for full, target in asked)


def test_an_answer_ends_where_it_is_if_that_leaves_while_it_was_to_go_and_nobody_had_room():
    """Unless `departure` lets it go."""
    ends = {}
    for departure in ("wait", "migrate"):
        drains = scheduled({"at_s": 0.1, "drain": "colocated-2"})
        long = ["workload.max_output_tokens=200", "workload.num_turns=1"]
        words = [*THREE["colocated"], *drains, *long, f"departure={departure}", "rebalancing=by_answers"]
        cluster = local(*words, "rebalancing.gap=1").cluster()
        assert_answered(play(cluster), *long)
        nothing_is_left(cluster)
        ends[departure] = next(m.ended_ns for m in cluster.members.members if m.ended_ns is not None)
    assert ends["migrate"] < ends["wait"]


def test_a_rule_that_names_nobody_else_is_refused():
    with pytest.raises(ValueError, match=r"Astray chose row \d: expected None or one of 0 to 2 that is not \d"):
        local(*THREE["colocated"], "rebalancing._target_=cluster.test_rebalancing.Astray").run()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["cluster=1p1d", "mode=pd_caching_3"],
            r"ByRoom contradicts cluster.roles=\['prefill', 'decode'\]: expected more",
        ),
        (["cluster=colocated_1"], "expected more than one colocated instance"),
        (["cluster=colocated_2", "rebalancing.low=0.5"], "rebalancing.low=0.5 is above rebalancing.high=0.3"),
        (["cluster=colocated_2", "rebalancing.high=2"], r"rebalancing.high=2: expected a number in \[0, 1\]"),
        (
            ["cluster=colocated_2", "rebalancing=by_answers", "rebalancing.gap=0"],
            "rebalancing.gap=0: expected",
        ),
    ],
)
def test_what_cannot_be_rebalanced_is_refused_by_name(words, said):
    with pytest.raises(ConfigError, match=said):
        local("rebalancing=by_room", *words)


def test_without_it_nothing_is_asked():
    @functools.cache
    def played(*words):
        return rows_of(play(local(*THREE["colocated"], *words).cluster()))

    assert played() == played("rebalancing=none")
    assert SLOW_LINK[0] in WORKLOAD and load_config([*WORKLOAD]).rebalancing["_target_"].endswith("NoRebalancing")
