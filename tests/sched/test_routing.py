import numpy as np
import pytest
from mini_cluster import group_of, snapshot

from memserve import LocalCluster, load_config
from memserve.messages import Cancel, Finished, Submit, Tokens, pack_times, pack_tokens
from memserve.request import FinishReason
from memserve.sampling_params import SamplingParams
from memserve.sched.global_scheduler import CLIENT, GlobalScheduler
from memserve.sched.routing import (
    LeastLoad,
    Policy,
    Random,
    RoundRobin,
    RouteRequest,
    SessionAffinity,
    StickyLeastLoad,
)


def route(session="s", name="r"):
    return RouteRequest(name, session, np.arange(3, dtype=np.int32), 0.0, 16)


def test_least_load_takes_the_fewest_requests_then_tokens_then_a_seeded_tie():
    rng = np.random.default_rng(0)
    assert LeastLoad().choose(route(), snapshot([2, 1, 3]), rng) == 1
    assert LeastLoad().choose(route(), snapshot([1, 1, 3], [50, 40, 1]), rng) == 1
    chosen = {LeastLoad().choose(route(), snapshot([1, 1, 1]), rng) for _ in range(50)}
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize("column", ["num_requests", "num_tokens", "num_cached", "queued_work", "num_lately", "labels",
                                    "num_decoding", "num_gpus", "free_blocks", "num_blocks", "said_s"])  # fmt: skip
def test_a_policy_that_writes_into_what_it_is_shown_is_stopped(column):
    class Marks(LeastLoad):
        def choose(self, request, cluster, rng):
            getattr(cluster, column)[0] = 1
            return super().choose(request, cluster, rng)

    group = group_of(["a", "b"], Marks())
    with pytest.raises((ValueError, TypeError), match="read-only|does not support item assignment"):
        group.choose(route(), 0, np.random.default_rng(0))
    assert group.labels == ("a", "b")


class Listens(LeastLoad):
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []

    def answered(self, request, label, num_generated, now_s):
        self.heard.append((request.request_id, len(request.tokens), label, num_generated, now_s))


@pytest.mark.parametrize("words", [["cluster=colocated_2"], ["cluster=1p2d", "mode=pd_caching_3"]])
def test_a_policy_hears_once_of_each_answer_where_it_was_and_how_long(words):
    own = [f"{node}._target_={__name__}.Listens" for node in ("policy", "decode_policy")]
    few = ["exec=simulated", "workload=synthetic", "workload.num_sessions=6", "workload.num_turns=2"]
    cluster = LocalCluster(load_config([*few, *words, *own])).cluster()
    while cluster.advance():
        pass
    groups, timelines = cluster.scheduler.groups, cluster.scheduler.timelines
    for group in groups.all:
        decodes = group is groups.decode
        ended = {t.request_id: t for t in timelines.values() if t.stats.decode_instance or not decodes}
        assert sorted(heard[0] for heard in group._policy.heard) == sorted(ended)
        for name, num_prompt, label, num_generated, now_s in group._policy.heard:
            timeline = ended[name]
            where = timeline.stats.decode_instance if decodes else timeline.stats.instance
            assert (num_prompt, label, num_generated) == (timeline.num_prompt, where, timeline.num_output)
            assert now_s == pytest.approx(timeline.finished_ns / 1e9)


def test_round_robin_takes_turns():
    turns = [RoundRobin().choose(route(), snapshot([0, 0, 0], num_routed=i), None) for i in range(6)]
    assert turns == [0, 1, 2, 0, 1, 2]


def test_random_is_seeded_and_uniform():
    draws = [[Random().choose(route(), snapshot([0] * 4), rng) for _ in range(400)]
             for rng in (np.random.default_rng(7), np.random.default_rng(7))]  # fmt: skip
    assert draws[0] == draws[1] and min(np.bincount(draws[0])) > 70


def test_session_affinity_keeps_sessions_spreads_them_and_moves_few_when_an_instance_joins():
    policy, sessions = SessionAffinity(), [f"session-{i}" for i in range(1000)]
    four = [policy.choose(route(s), snapshot([0] * 4), None) for s in sessions]
    assert four == [policy.choose(route(s), snapshot([9, 0, 0, 0]), None) for s in sessions]
    assert np.bincount(four).min() > 200
    five = [policy.choose(route(s), snapshot([0] * 5), None) for s in sessions]
    moved = [b for a, b in zip(four, five, strict=True) if a != b]
    assert set(moved) == {4} and len(moved) < 300


def test_sticky_least_load_keeps_a_session_at_home_and_places_a_new_one_by_load():
    rng, policy = np.random.default_rng(0), StickyLeastLoad()
    assert policy.choose(route(), snapshot([9, 0, 1], home=0), rng) == 0
    assert policy.choose(route(), snapshot([9, 0, 1]), rng) == 1
    assert policy.choose(route(), snapshot([2, 2, 2], tokens=[30, 30, 8]), rng) == 2


def test_sessions_decode_where_their_kv_is_and_as_evenly_as_by_load_alone():
    words = ["exec=simulated", "cluster=1p2d", "mode=pd_caching_3", "workload=synthetic", "workload.num_sessions=40",
             "workload.num_turns=3", "workload.rate=40", "workload.max_output_tokens=60"]  # fmt: skip
    found = {
        policy: LocalCluster(load_config([*words, *chosen])).run()
        for policy, chosen in {
            "default": [],
            "least_load": ["policy@decode_policy=least_load"],
            "session_affinity": ["policy@decode_policy=session_affinity"],
        }.items()
    }
    sent = {policy: report["transfers"]["p_to_d"]["tokens"] for policy, report in found.items()}
    most = {policy: max(i["num_generated"] for i in report["instances"]) for policy, report in found.items()}
    assert sent["default"] == sent["session_affinity"] < sent["least_load"]
    assert most["default"] < most["session_affinity"]


def submit(name, session="s"):
    return Submit(name, session, pack_tokens(np.arange(5)), SamplingParams(), 0)


def make(policy=None, labels=("i-0", "i-1"), **options):
    return GlobalScheduler(group_of(labels, policy or RoundRobin()), np.random.default_rng(0), **options)


def load_of(scheduler):
    rows = scheduler.groups.takers.rows()
    return scheduler.groups.takers.snapshot(rows, np.zeros(len(rows), dtype=np.int64), "s", 0)


def test_tokens_and_the_end_pass_to_the_client_and_the_load_goes_back():
    scheduler = make()
    scheduler.receive(submit("a"), 5)
    [(label, message)] = scheduler.drain_outbox()
    assert label == "i-0" and message.attempt == 0 and load_of(scheduler).num_requests.tolist() == [1, 0]
    token = Tokens("a", 0, 0, pack_tokens(np.array([7])), pack_times(np.array([9])))
    end = Finished("a", 0, FinishReason.LENGTH, "", None)
    scheduler.receive(token, 9)
    scheduler.receive(end, 9)
    assert scheduler.drain_outbox() == [(CLIENT, token), (CLIENT, end)]
    timeline = scheduler.timelines["a"]
    assert timeline.token_ids.tolist() == [7] and timeline.token_times_ns.tolist() == [9]
    assert (timeline.dispatched_ns, timeline.finished_ns, timeline.instance) == (5, 9, "i-0")
    assert load_of(scheduler).num_tokens.tolist() == [0, 0] and scheduler.num_unfinished == 0


def test_messages_of_an_ended_or_older_attempt_are_dropped():
    scheduler = make()
    scheduler.receive(submit("a"), 0)
    scheduler.drain_outbox()
    scheduler.receive(Finished("a", 3, FinishReason.LENGTH, "", None), 1)
    assert scheduler.drain_outbox() == [] and scheduler.num_unfinished == 1
    scheduler.receive(Finished("a", 0, FinishReason.LENGTH, "", None), 2)
    scheduler.receive(Finished("a", 0, FinishReason.LENGTH, "", None), 3)
    assert len(scheduler.drain_outbox()) == 1 and scheduler.timelines["a"].finished_ns == 2


def test_a_cancel_goes_to_the_instance_that_serves_and_nowhere_once_it_has_ended():
    scheduler = make()
    scheduler.receive(submit("a"), 0)
    scheduler.receive(submit("b"), 0)
    scheduler.drain_outbox()
    scheduler.receive(Cancel("b"), 1)
    [(label, abort)] = scheduler.drain_outbox()
    assert label == "i-1" and abort.request_id == "b"
    scheduler.receive(Cancel("unknown"), 1)
    assert scheduler.drain_outbox() == []


def test_a_request_id_cannot_be_used_twice():
    scheduler = make()
    scheduler.receive(submit("a"), 0)
    with pytest.raises(ValueError, match="'a' was submitted before"):
        scheduler.receive(submit("a"), 0)


def test_a_policy_that_names_no_instance_is_refused():
    class Wild(Policy):
        def choose(self, request, cluster, rng):
            return 9

    with pytest.raises(ValueError, match="Wild chose row 9: expected 0 to 1"):
        make(Wild()).receive(submit("a"), 0)


def test_a_request_beyond_the_bound_is_refused_by_name_and_room_comes_back():
    scheduler = make(max_unfinished=2)
    for name in "abc":
        scheduler.receive(submit(name), 5)
    (refused,) = [message for _, message in scheduler.drain_outbox() if isinstance(message, Finished)]
    assert (refused.request_id, refused.reason) == ("c", FinishReason.REFUSED)
    assert "2 requests are unfinished" in refused.detail and "cluster.max_unfinished" in refused.detail
    assert load_of(scheduler).num_requests.tolist() == [1, 1] and scheduler.num_unfinished == 2
    scheduler.receive(Finished("a", 0, FinishReason.STOP, "", None), 6)
    scheduler.receive(submit("d"), 7)
    assert scheduler.timelines["d"].reason is None and scheduler.timelines["c"].dispatched_ns is None


@pytest.mark.parametrize("max_unfinished", [1, 3])
def test_a_bounded_cluster_never_has_more_and_refuses_the_rest(max_unfinished):
    words = ["exec=simulated", "workload=synthetic", "workload.num_sessions=20", "workload.num_turns=1"]
    cfg = load_config([*words, "workload.rate=1000", f"cluster.max_unfinished={max_unfinished}"])
    cluster, most = LocalCluster(cfg).cluster(), 0
    while cluster.advance():
        most = max(most, cluster.scheduler.num_unfinished)
    ends = [timeline.reason for timeline in cluster.scheduler.timelines.values()]
    assert most == max_unfinished and len(ends) == 20
    assert 0 < ends.count(FinishReason.REFUSED) < 20 and ends.count(FinishReason.LENGTH) > 0
