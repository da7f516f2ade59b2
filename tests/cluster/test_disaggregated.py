"""A cluster of prefill and decode instances under faults, overload, aborts and bad words. Answers are HashRunner's."""

import functools

import msgspec
import numpy as np
import pytest
from cluster.playing import tokens_of

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.handoff import GivenBack
from memserve.messages import Ask, Cancel, Refuse, pack_tokens
from memserve.request import FinishReason, Request
from memserve.sampling_params import SamplingParams
from memserve.served import Served
from memserve.transfer import MessageFaults

KINDS = ("Ask", "Grant", "Wait", "Done", "Inserted", "Abandon", "AbortAck")
WORKLOAD = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=5", "workload.num_turns=2",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=10", "workload.rate=100",
]  # fmt: skip
PD = ["cluster=1p1d", "mode=pd_caching_3", "transfer.retry_s=0.05", "transfer.deadline_s=0.5", "transfer.patience_s=5"]


@functools.cache
def local(*words):
    return LocalCluster(load_config([*WORKLOAD, *words]))


def play(cluster, each_event=lambda cluster: None):
    """Until nothing is left to do; the timelines. Every instance's books are checked at the end."""
    while cluster.advance():
        each_event(cluster)
    for node in cluster.nodes:
        node.instance.check()
        assert not node.instance.num_unfinished
    return list(cluster.scheduler.timelines.values())


@functools.cache
def expected():
    return tokens_of(play(local("cluster=colocated_1", "index=none").cluster()))


def assert_right(timelines):
    """Every answer is right, or failed by name."""
    for timeline in timelines:
        if timeline.succeeded:
            assert timeline.token_ids.tolist() == expected()[timeline.request_id]
        else:
            assert timeline.reason is FinishReason.TRANSFER_FAILED and timeline.detail


def nothing_is_left(cluster):
    for node in cluster.nodes:
        transfers = node.instance.handoffs.transfers
        assert transfers.num_open == transfers.num_quarantined == 0
        held = [h for h in node.instance.pool.allocator.holders() if h != ("index",)]
        assert not held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["drop", "repeat", "delay"])
@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_answers_survive_any_kind_of_message_being_lost_repeated_or_overtaken(kind, fault, granularity):
    cluster = local(*PD, f"granularity={granularity}").cluster()
    rng = np.random.default_rng(0)
    cluster.faults = MessageFaults(rng, **{fault: 0.7}, delay_ns=100_000_000, kinds=[kind], limit=20)
    timelines = play(cluster)
    assert_right(timelines)
    assert all(timeline.succeeded for timeline in timelines)
    nothing_is_left(cluster)


@pytest.mark.parametrize("words", [PD, [*PD, "granularity=by_layer", "sched.chunk_size=16"], ["cluster=colocated_2"]])
def test_answers_are_the_same_where_prompts_have_steps_of_their_own(words):
    cluster = local(*words, "batching=prefill_first", "kvcache.block_size=4", "kvcache.num_hbm_blocks=50").cluster()
    timelines = play(cluster)
    assert_right(timelines)
    assert all(timeline.succeeded for timeline in timelines)


TIGHT = [
    ["mode=pd_caching_3", "workload.rate=2", "workload.prompt_tokens=100", "kvcache.num_hbm_blocks=500",
     "sched.token_budget=256", "sched.max_running=2", "seed=96"],
    ["mode=pd_basic", "granularity=by_layer", "workload.rate=20", "workload.prompt_tokens=40",
     "kvcache.num_hbm_blocks=300", "sched.token_budget=64", "sched.chunk_size=16", "seed=53"],
]  # fmt: skip


@pytest.mark.parametrize("macro_steps", ["true", "false"])
@pytest.mark.parametrize("words", TIGHT, ids=["two run", "by layer"])
def test_who_preempts_itself_as_the_last_that_runs_keeps_nobody_waiting_for_ever(words, macro_steps):
    workload = ["workload=synthetic", "workload.num_sessions=25", "workload.num_turns=3",
                "workload.max_output_tokens=60", "kvcache.block_size=4"]  # fmt: skip
    own = ["exec=simulated", "cluster=1p1d", *workload, *words, f"macro_steps={macro_steps}"]
    report = LocalCluster(load_config([*own, "batching=prefill_first"])).run()
    assert report["num_finished"] == 75 and report["num_failed"] == 0


def test_kv_that_comes_back_too_late_is_counted_once_however_often_it_is_asked_for():
    handoffs = local(*PD).cluster().nodes[0].instance.handoffs
    served = Served(Request("r", np.arange(4, dtype=np.int32), SamplingParams(), session_id="s"), 0, None)
    block_size, late = handoffs.transfers.geometry.block_size, msgspec.msgpack.encode(GivenBack("s"))
    tokens = pack_tokens(np.arange(block_size))
    for number in (1, 2):
        ask = Ask((1, number), tokens, 1, 0, True, True, False, late, handoffs.transfers.geometry)
        for _ in range(3):
            handoffs.receive(1, ask, {"r": served}, 0)
    assert handoffs.returns.num_overtaken == 2


@pytest.mark.parametrize("cancelled_after", [12, None])
def test_blocks_on_their_way_keep_what_lies_above_them_in_the_index(cancelled_after):
    """Two requests compute one prefix; what follows it in the second lies below the first one's blocks in the index.
    The second ends while its own are on their way: given back, or in a hand-off of which it is cancelled.
    """
    words = ["workload/arrivals=closed_loop", "workload.arrivals.concurrency=2", "workload.rate=null",
             "workload.prefix_tokens=8", "workload.share_ratio=5", "workload.prompt_tokens=8",
             "kvcache.block_size=4", "link.latency_s=0.001"]  # fmt: skip
    cluster, num_events = local("cluster=1p1d", "mode=pd_caching_3", *words).cluster(), 0

    def check(cluster):
        nonlocal num_events
        num_events += 1
        if num_events == cancelled_after:
            for request_id in cluster.scheduler.timelines:
                cluster.scheduler.receive(Cancel(request_id), cluster.now_ns)
            cluster._from_scheduler()
        for node in cluster.nodes:
            node.instance.check()

    play(cluster, check)


@pytest.mark.parametrize("on_failure", ["recompute", "fail"])
def test_a_stalled_writer_costs_a_new_attempt_or_a_named_failure(on_failure):
    stalling = "transport._target_=memserve.transfer.StallingTransport"
    cluster = local(*PD, f"transfer.on_failure={on_failure}", "mode=pd_basic", stalling).cluster()
    cluster.transport.stall(0, 2_000_000_000)
    timelines = play(cluster)
    assert_right(timelines)
    assert any(t.attempt > 0 for t in timelines) == (on_failure == "recompute")
    assert any(not t.succeeded for t in timelines) or on_failure == "recompute"
    nothing_is_left(cluster)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize("after_events", range(3, 60, 6))
def test_a_client_may_cancel_at_any_moment(granularity, after_events):
    cluster = local(*PD, f"granularity={granularity}").cluster()
    state = {"events": 0}

    def cancel(cluster):
        state["events"] += 1
        if state["events"] == after_events:
            for request_id in list(cluster.scheduler.timelines):
                cluster._to_scheduler(Cancel(request_id))

    timelines = play(cluster, cancel)
    for timeline in timelines:
        tokens = timeline.token_ids.tolist()
        assert timeline.reason is FinishReason.ABORTED or tokens == expected()[timeline.request_id]
    nothing_is_left(cluster)


def test_a_decode_instance_too_small_for_its_load_makes_hand_offs_wait_and_computes_nothing_twice():
    words = ["cluster=3p1d", "mode=pd_basic", "kvcache.num_hbm_blocks=12", "sched.decode_headroom_blocks=2"]
    cluster = local(*words, "workload.rate=10000", "workload.num_sessions=12").cluster()
    most_waiting = []

    def count(cluster):
        most_waiting.append(sum(len(n.instance.handoffs.requests) for n in cluster.nodes))

    timelines = play(cluster, count)
    assert all(timeline.succeeded for timeline in timelines)
    assert max(most_waiting) > 3
    assert sum(t.stats.num_computed_on_decode for t in timelines) == 0
    assert any(t.stats.granted_ns > t.stats.prefill_end_ns for t in timelines)
    nothing_is_left(cluster)


def test_what_waits_with_a_prefix_in_dram_holds_what_took_its_place_when_another_brought_it_up():
    """Between any two steps: nothing that is used lies below a cached block that is not, which could not be evicted."""
    shared = ["workload.num_sessions=18", "workload.num_turns=3", "workload.rate=40", "workload.max_output_tokens=40",
              "workload.prefix_tokens=24", "workload.share_ratio=6"]  # fmt: skip
    pools = ["kvcache.block_size=4", "kvcache.num_hbm_blocks=68", "kvcache.num_dram_blocks=300"]
    displaced = []
    cluster = local("cluster=1p1d", "mode=pd_caching_3", *shared, *pools).cluster()
    cluster.nodes[1].instance.pool.followers.append(lambda old, new: displaced.extend(old))

    def check(cluster):
        if cluster.nodes[1].step is None:
            cluster.nodes[1].instance.check()

    play(cluster, check)
    assert displaced


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["mode=pd_basic", "cluster.roles=[prefill,prefill]"], "none is decode; expected prefill and decode"),
        ([*PD, "granularity=by_request_agg"], "granularity=by_request_agg contradicts layout=discrete"),
        ([*PD, "link.gb_per_s=0"], "gb_per_s=0"),
        ([*PD, "link.latency_s=-1"], "latency_s=-1"),
    ],
)
def test_contradictions_are_named_before_anything_runs(words, named):
    with pytest.raises(ConfigError) as raised:
        LocalCluster(load_config([*WORKLOAD, *words]))
    assert named in str(raised.value)


def test_a_hand_off_that_was_refused_does_not_wait_for_a_grant():
    instance = local(*PD).cluster().nodes[0].instance
    handoffs = instance.handoffs
    for number in range(3):
        request = Request(f"r{number}", np.arange(8, dtype=np.int32), SamplingParams(max_tokens=4))
        request.block_table.extend(instance.pool.alloc(instance.pool.blocks_for(8), request.holder))
        request.tokens.append(1)
        request.num_computed = 8
        handoffs.prefilled(request, 1, Served(request, 0, None).stats("prefill-0"), 0)
        ((_, ask),) = handoffs.drain_outbox()
        handoffs.receive(1, Refuse(ask.ticket, "no"), {}, 0)
    assert handoffs.peak_waiting == 1
