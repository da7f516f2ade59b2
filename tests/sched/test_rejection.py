"""A request whose answer is predicted to come too late is refused, and leaves no trace in anybody's load."""

import numpy as np
import pytest
from mini_cluster import group_of

from memserve import LocalCluster, load_config
from memserve.messages import Dispatch, Finished, HandoffEnded, Submit, Tokens, pack_times, pack_tokens
from memserve.request import FinishReason
from memserve.sampling_params import SamplingParams
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.modes import PDBasic
from memserve.sched.rejection import EarlyRejection, NoRejection, Prospect, Rejection
from memserve.sched.routing import LeastLoad, RoundRobin, RouteRequest

COSTS = FixedCostModel(step_s=0.01, prefill_token_s=0.001, decode_token_s=0.002)  # 5 tokens: .015 s
NOW_NS = 10**9


def prospect(**known):
    request = RouteRequest("r", "s", np.arange(10, dtype=np.int32), 0.0, 16)
    usual = {"waited_s": 0.0, "queued_s": 0.0, "prefill_s": 0.1, "num_decoding": 0, "num_decoding_tokens": 0}
    return Prospect(request, NOW_NS, **{**usual, **known})


def submit(name, num_tokens=5, arrival_ns=NOW_NS, session="s"):
    return Submit(name, session, pack_tokens(np.arange(num_tokens)), SamplingParams(), arrival_ns)


def make(rejection, decode=None, **options):
    takers = group_of(["p-0", "p-1"], LeastLoad(), costs=COSTS)
    return GlobalScheduler(takers, np.random.default_rng(0), decode=decode, rejection=rejection, **options)


def dispatched(scheduler):
    return [(label, m.request_id) for label, m in scheduler.drain_outbox() if isinstance(m, Dispatch)]


@pytest.mark.parametrize(
    ("known", "is_refused"),
    [
        ({}, False),
        ({"queued_s": 0.4}, False),
        ({"queued_s": 0.401}, True),
        ({"waited_s": 0.3, "queued_s": 0.101}, True),
        ({"prefill_s": 0.6}, True),
        ({"num_decoding": 10**4, "num_decoding_tokens": 10**6}, False),
    ],
)
def test_a_first_token_is_in_time_after_all_that_is_before_it(known, is_refused):
    reason = EarlyRejection(COSTS, ttft_s=0.5).reason(prospect(**known))
    assert (reason is not None) == is_refused
    assert reason is None or "s: expected within slo.ttft_s=0.5" in reason
    assert NoRejection().reason(prospect(**known)) is None


def test_a_token_is_in_time_if_a_step_of_all_that_decode_there_is():
    rejection = EarlyRejection(COSTS, tpot_s=0.05)  # a step of n takes .01 + .002 n
    assert rejection.reason(prospect(num_decoding=19, num_decoding_tokens=190)) is None
    reason = rejection.reason(prospect(num_decoding=20, num_decoding_tokens=200))
    assert reason == "a token is predicted to take 0.052 s: expected within slo.tpot_s=0.05"
    assert rejection.reason(prospect(queued_s=100.0)) is None


def test_the_scale_stretches_both_objectives_and_is_named():
    wide = EarlyRejection(COSTS, ttft_s=0.5, tpot_s=0.05, slo_scale=2.0)
    assert wide.reason(prospect(queued_s=0.9)) is None
    assert wide.reason(prospect(queued_s=0.91)).endswith("expected within 2 times slo.ttft_s=0.5")
    assert wide.reason(prospect(num_decoding=44)) is None
    assert wide.reason(prospect(num_decoding=45)).endswith("expected within 2 times slo.tpot_s=0.05")


def test_what_is_refused_is_told_why_and_counts_nowhere():
    scheduler = make(EarlyRejection(COSTS, ttft_s=0.03))  # room for two prefills on each instance
    for name in "abcde":
        scheduler.receive(submit(name), NOW_NS)
    out = scheduler.drain_outbox()
    assert sorted(label for label, message in out if isinstance(message, Dispatch)) == ["p-0", "p-0", "p-1", "p-1"]
    (refused,) = [message for _, message in out if isinstance(message, Finished)]
    assert (refused.request_id, refused.reason) == ("e", FinishReason.REFUSED)
    assert refused.detail == "its first token is predicted after 0.045 s: expected within slo.ttft_s=0.03"
    takers, timeline = scheduler.groups.takers, scheduler.timelines["e"]
    assert takers.num_routed_to.tolist() == [2, 2] and scheduler.num_unfinished == 4
    assert sum(takers.num_requests(label) for label in takers.labels) == 4
    assert timeline.dispatched_ns is None and timeline.routes == [] and timeline.finished_ns == NOW_NS


def test_in_turns_a_request_that_is_refused_has_had_its_turn():
    takers = group_of(["p-0", "p-1"], RoundRobin(), costs=COSTS)
    scheduler = GlobalScheduler(takers, np.random.default_rng(0), rejection=EarlyRejection(COSTS, ttft_s=0.5))
    for name, num_tokens in (("long", 450), ("a", 5), ("refused", 50), ("b", 50), ("refused too", 50), ("c", 50)):
        scheduler.receive(submit(name, num_tokens), NOW_NS)
    assert dispatched(scheduler) == [("p-0", "long"), ("p-1", "a"), ("p-1", "b"), ("p-1", "c")]


def test_room_comes_back_with_the_first_token_before_it_in_line():
    scheduler = make(EarlyRejection(COSTS, ttft_s=0.02))  # of one
    for name in "abc":
        scheduler.receive(submit(name), NOW_NS)
    (_, first), _ = dispatched(scheduler)
    scheduler.receive(Tokens(first, 0, 0, pack_tokens(np.array([7])), pack_times(np.array([NOW_NS]))), NOW_NS)
    scheduler.receive(submit("d"), NOW_NS)
    assert [name for _, name in dispatched(scheduler)] == ["d"]
    assert scheduler.timelines["c"].reason is FinishReason.REFUSED


def test_the_time_that_a_request_has_waited_for_an_instance_counts():
    scheduler = make(EarlyRejection(COSTS, ttft_s=0.5), patience_ns=10**12)
    for label in ("p-0", "p-1"):
        scheduler.instance_draining(label, 0)
    scheduler.receive(submit("late"), NOW_NS)
    scheduler.receive(submit("in-time", arrival_ns=NOW_NS + 10**9), NOW_NS + 10**9)
    scheduler.instance_back("p-0", NOW_NS + 10**9)
    assert dispatched(scheduler) == [("p-0", "in-time")]
    assert "predicted after 1.0" in scheduler.timelines["late"].detail


def test_a_later_attempt_is_served_however_late_it_is():
    decode = group_of(["d-0"], RoundRobin())
    scheduler = make(EarlyRejection(COSTS, ttft_s=0.02), decode=decode, mode=PDBasic())
    scheduler.receive(submit("a"), NOW_NS)
    scheduler.drain_outbox()
    scheduler.receive(HandoffEnded("a", 0, "d-0", done=False, reason="gone", refused=False), NOW_NS + 10**10)
    assert [name for _, name in dispatched(scheduler)] == ["a"]


def test_tokens_are_predicted_for_the_instance_that_decodes():
    decode = group_of(["d-0"], RoundRobin())
    scheduler = make(EarlyRejection(COSTS, tpot_s=0.015), decode=decode, mode=PDBasic())  # a step of two takes .014
    for name in "abc":
        scheduler.receive(submit(name), NOW_NS)
    assert [name for _, name in dispatched(scheduler)] == ["a", "b"]
    assert decode.num_requests("d-0") == 2 and "predicted to take 0.016 s" in scheduler.timelines["c"].detail


def test_a_rule_of_ones_own_knows_the_request_and_the_time_and_is_asked_once_a_request():
    seen = []

    class Keeping(Rejection):
        """Refuses sessions that are new after the first second; those under way go on."""

        def reason(self, prospect):
            seen.append((prospect.request.request_id, prospect.request.session_id, prospect.now_ns))
            return "the door is closed" if prospect.now_ns > NOW_NS and prospect.request.session_id != "old" else None

    scheduler = make(Keeping(), decode=group_of(["d-0"], RoundRobin()), mode=PDBasic())
    scheduler.receive(submit("a", session="old"), NOW_NS)
    scheduler.receive(HandoffEnded("a", 0, "p-0", done=False, reason="gone"), NOW_NS + 1)
    scheduler.receive(submit("b", session="old"), NOW_NS + 2)
    scheduler.receive(submit("c", session="new"), NOW_NS + 3)
    assert seen == [("a", "old", NOW_NS), ("b", "old", NOW_NS + 2), ("c", "new", NOW_NS + 3)]
    assert scheduler.timelines["c"].detail == "the door is closed" and scheduler.num_unfinished == 2


def test_a_rule_that_gives_no_words_is_named():
    class Curt(Rejection):
        def reason(self, prospect):
            return True

    with pytest.raises(ValueError, match="Curt.reason gave True: expected words, or None"):
        make(Curt()).receive(submit("a"), NOW_NS)


@pytest.mark.parametrize("cluster", [["cluster=colocated_2"], ["cluster=1p1d", "mode=pd_caching_3"]])
def test_under_too_much_load_more_answers_are_in_time_and_without_it_nothing_changes(cluster):
    words = ["exec=simulated", "workload=synthetic", "workload.num_turns=1", "slo.ttft_s=0.25", *cluster]
    both = ("rejection=none", "rejection=early")
    calm = ["workload.num_sessions=40", "workload.rate=10"]
    served, refusing = ({**LocalCluster(load_config([*words, *calm, word])).run(), "wall_s": 0} for word in both)
    assert served == refusing
    rush = ["workload.num_sessions=300", "workload.rate=320"]
    served, refusing = (LocalCluster(load_config([*words, *rush, word])).run() for word in both)
    assert served["failures"] == {} and refusing["failures"]["refused"] == refusing["num_failed"] > 0
    assert refusing["goodput"]["num_good"] > 1.2 * served["goodput"]["num_good"]
    assert refusing["goodput"]["missed"]["ttft_s"] < 0.2 * served["goodput"]["missed"]["ttft_s"]
