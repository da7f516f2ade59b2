"""KV fetched from another instance: the same answers as without, whatever goes wrong, and every decision on record.

But for the last, the tests stand in for the global scheduler's trees: to each Dispatch they attach what every other
instance's index has.
"""

import functools
import itertools
import json
import re

import msgspec
import numpy as np
import pytest
from cluster.playing import tokens_of

from memserve import LocalCluster, load_config
from memserve.cluster.emulated import EmulatedCluster
from memserve.config.errors import ConfigError
from memserve.decisions import Holding
from memserve.messages import Ask, Cancel, Dispatch, Fetch, pack_tokens, unpack_tokens
from memserve.metrics.records import request_record
from memserve.metrics.report import build_report
from memserve.request import FinishReason, Phase
from memserve.sampling_params import SamplingParams
from memserve.sched.fetch_policy import FetchPolicy
from memserve.transfer import MessageFaults

WORKLOAD = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=5", "workload.num_turns=3",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=10", "workload.rate=100",
    "transfer.retry_s=0.05", "transfer.deadline_s=0.5", "transfer.patience_s=5",
]  # fmt: skip
COLOCATED = ("cluster=colocated_2", "mode=colocated", "policy=round_robin")
PREFILL = ("cluster=3p1d", "mode=pd_caching_3", "policy=round_robin")


class KnowingCluster(EmulatedCluster):
    """One that knows what everybody has cached, and perhaps what nobody has."""

    promised = 0  # tokens that every other instance is said to hold at least

    def _deliver(self, node, message):
        if isinstance(message, Dispatch):
            held = self._holdings(node, unpack_tokens(message.tokens))
            message = msgspec.structs.replace(message, held_elsewhere=tuple(held))
        super()._deliver(node, message)

    def _holdings(self, node, tokens):
        return [
            Holding(number, max(other.instance.pool.index.peek(tokens, len(tokens)).num_tokens, self.promised))
            for number, other in enumerate(self.nodes)
            if other is not node
        ]


@functools.cache
def local(*words):
    return LocalCluster(load_config([*WORKLOAD, *words]))


def cluster_of(*words, kind=KnowingCluster):
    made = local(*words).cluster()
    return kind(made.nodes, made.scheduler, made.client, made.step_time, made.macro_steps, made.transport)


def play(cluster, each_event=lambda cluster: None):
    while cluster.advance():
        each_event(cluster)
    for node in cluster.nodes:
        if not node.is_gone:
            node.instance.check()
            handoffs = node.instance.handoffs
            assert not node.instance.num_unfinished
            if handoffs is not None:
                assert (
                    handoffs.transfers.num_open == handoffs.transfers.num_quarantined == handoffs.fetches.num_open == 0
                )
            assert [h for h in node.instance.pool.allocator.holders() if h != ("index",)] == []
    return list(cluster.scheduler.timelines.values())


@functools.cache
def expected(*words):
    alone = local("cluster=colocated_1", "index=none", *words)
    return tokens_of(play(alone.cluster()))


def assert_right(timelines, *words):
    for timeline in timelines:
        assert timeline.succeeded and timeline.token_ids.tolist() == expected(*words)[timeline.request_id]


def records(timelines):
    return [t.stats.fetch for t in timelines if t.stats is not None and t.stats.fetch is not None]


def outcomes(timelines):
    return {record.outcome for record in records(timelines)}


@pytest.mark.parametrize("place", [COLOCATED, PREFILL], ids=["colocated", "3p1d"])
@pytest.mark.parametrize("granularity", ["by_layer", "by_request", "packed"])
def test_answers_are_the_same_when_everything_is_fetched(place, granularity):
    timelines = play(cluster_of(*place, "fetch=always", f"granularity={granularity}"))
    assert_right(timelines)
    assert outcomes(timelines) == {"fetched"}
    assert sum(t.stats.num_fetched for t in timelines) > 100


def test_what_is_fetched_is_not_computed():
    never, always = (play(cluster_of(*COLOCATED, f"fetch={word}")) for word in ("never", "always"))
    computed = [sum(t.stats.num_computed for t in timelines) for timelines in (never, always)]
    fetched = sum(t.stats.num_fetched for t in always)
    cached = [sum(t.stats.num_cached_local for t in timelines) for timelines in (never, always)]
    assert fetched > 0 and computed[0] - computed[1] == fetched + cached[1] - cached[0]
    for t in always:
        assert t.stats.num_cached_local + t.stats.num_fetched + t.stats.num_computed == t.num_prompt


def test_who_never_fetches_decides_nothing_and_waits_for_no_decision():
    """Where KV is handed over there is a transport all the same, and instances are told who holds more."""
    timelines = play(cluster_of(*PREFILL, "fetch=never"))
    assert_right(timelines)
    assert records(timelines) == [] and all(t.stats.fetch_end_ns is None for t in timelines)


@pytest.mark.parametrize("place", [COLOCATED, PREFILL], ids=["colocated", "3p1d"])
@pytest.mark.parametrize("kind", ["Fetch", "Ask", "Grant", "Done", "Inserted", "Refuse"])
@pytest.mark.parametrize("fault", ["drop", "repeat", "delay"])
def test_answers_survive_lost_repeated_and_late_messages(place, kind, fault):
    cluster = cluster_of(*place, "fetch=always", "kvcache.num_hbm_blocks=24")
    rng = np.random.default_rng(0)
    cluster.faults = MessageFaults(rng, **{fault: 0.7}, delay_ns=100_000_000, kinds=[kind], limit=20)
    assert_right(play(cluster))


def test_a_fetch_that_never_comes_is_given_up_at_its_deadline_and_computed():
    cluster = cluster_of(*COLOCATED, "fetch=always")
    cluster.faults = MessageFaults(np.random.default_rng(0), drop=1.0, kinds=["Fetch"], limit=10_000)
    timelines = play(cluster)
    assert_right(timelines)
    assert outcomes(timelines) == {"failed"}
    for record in records(timelines):
        assert record.ended_ns - record.began_ns == 500_000_000 and "within the deadline" in record.reason


def test_a_holder_that_has_evicted_it_refuses_and_the_prompt_is_computed():
    cluster = cluster_of(*COLOCATED, "fetch=always")
    cluster.promised = 1000
    timelines = play(cluster)
    assert_right(timelines)
    assert "refused" in outcomes(timelines)
    assert all("no more than the" in r.reason for r in records(timelines) if r.outcome == "refused")


def test_what_an_instance_that_is_gone_asked_for_last_is_neither_sent_nor_counted():
    cluster = cluster_of(*COLOCATED, "fetch=always")
    play(cluster)
    holder = cluster.nodes[1].instance
    handoffs, (prompt, _) = holder.handoffs, next(holder.pool.index.iter_prefixes())
    handoffs.peer_gone(0, cluster.now_ns)
    handoffs.fetches.receive(0, Fetch((0, -100), pack_tokens(prompt), len(prompt), 0), cluster.now_ns)
    assert handoffs.poll(cluster.now_ns) == [] and handoffs.drain_outbox() == []
    assert handoffs.transfers.counts.failed == 0


def test_a_requester_without_room_declines_and_computes_later():
    cluster, taken = cluster_of(*COLOCATED, "fetch=always", "macro_steps=false"), {}

    def take_all_room_once(cluster):
        """While a node waits for KV for the first time, somebody else holds what is free there."""
        for node in cluster.nodes:
            pool, label = node.instance.pool, node.instance.label
            fetching = any(s.request.phase is Phase.FETCHING for s in node.instance.served.values())
            if fetching and label not in taken:
                taken[label] = len(pool.alloc(pool.num_available, ("test",)))
            elif not fetching and taken.get(label):
                taken[label] = 0
                pool.release_all(("test",))

    timelines = play(cluster, take_all_room_once)
    assert_right(timelines)
    assert any(r.outcome == "refused" and "no room" in r.reason for r in records(timelines))


@pytest.mark.parametrize("victim", ["colocated-0", "colocated-1"])
def test_a_holder_may_die_at_any_moment(victim):
    for after_events in range(10, 200, 16):
        cluster, state = cluster_of(*COLOCATED, "fetch=always", "link.gb_per_s=0.0001"), {"events": 0}

        def crash(cluster, state=state, after_events=after_events):
            state["events"] += 1
            if state["events"] == after_events:
                cluster.crash(victim)

        assert_right(play(cluster, crash))


def test_a_client_may_cancel_while_its_kv_is_fetched():
    cluster, cancelled = cluster_of(*COLOCATED, "fetch=always", "link.gb_per_s=0.0001"), set()

    def cancel(cluster):
        for node in cluster.nodes:
            for served in list(node.instance.served.values()):
                name = served.request.request_id
                if served.request.phase is Phase.FETCHING and len(cancelled) < 3 and name not in cancelled:
                    cancelled.add(name)
                    cluster._to_scheduler(Cancel(name))

    timelines = play(cluster, cancel)
    assert len(cancelled) == 3
    for t in timelines:
        if t.request_id in cancelled:
            assert t.reason is FinishReason.ABORTED
        elif t.succeeded:
            assert t.token_ids.tolist() == expected()[t.request_id]


@pytest.mark.parametrize(("gb_per_s", "outcome"), [(1000.0, "fetched"), (1e-6, "computed")])
def test_by_cost_it_is_fetched_where_the_link_is_fast_and_computed_where_it_is_slow(gb_per_s, outcome):
    timelines = play(cluster_of(*COLOCATED, "fetch=cost", f"link.gb_per_s={gb_per_s}"))
    assert_right(timelines)
    assert outcomes(timelines) == {outcome}
    for record in records(timelines):
        assert (record.fetch_s <= record.compute_s) == record.chose_fetch == (outcome == "fetched")


def test_the_time_that_a_fetch_takes_is_the_one_predicted_when_nothing_else_is_sent():
    words = ["workload.num_sessions=1", "link.gb_per_s=0.001", "workload.num_turns=4"]
    timelines = play(cluster_of(*COLOCATED, "fetch=always", *words))
    for record in records(timelines):
        assert (record.ended_ns - record.began_ns) / 1e9 == pytest.approx(record.fetch_s, rel=0.05)


LONG_STEPS = ["cost_model.step_s=0.5", "workload.num_sessions=13", "transfer.deadline_s=30"]


@pytest.mark.parametrize("place", [COLOCATED, PREFILL], ids=["colocated", "3p1d"])
def test_kv_comes_within_the_time_predicted_however_long_the_steps_of_both_ends_are(place):
    """Nobody waits for the end of a step but who reads that it is there."""
    timelines = play(cluster_of(*place, "fetch=always", *LONG_STEPS))
    assert_right(timelines, *LONG_STEPS)
    came = [r for r in records(timelines) if r.outcome == "fetched"]
    assert len(came) > 5 and max(r.ended_ns - r.began_ns for r in came) > 0.3e9, "somebody was in a step"
    for record in came:
        assert (record.arrived_ns - record.began_ns) / 1e9 < 2 * record.fetch_s < 0.05


BESIDE = [
    [*COLOCATED, "workload.rate=20", "link=unlimited"],
    [*COLOCATED, "kvcache.num_hbm_blocks=24", "index_source=exact"],
    [*COLOCATED, "kvcache.num_hbm_blocks=24", "kvcache.num_dram_blocks=10", "cost_model.step_s=0.005"],
    [*PREFILL, "granularity=by_layer", "workload.rate=20"],
    [*PREFILL, "granularity=packed", "kvcache.num_hbm_blocks=24", "granularity.merge=true"],
]


@pytest.mark.parametrize("words", BESIDE, ids=["no latency", "full", "tiers", "by layer", "packed"])
def test_macro_steps_change_nothing_where_others_are_served_beside_them(words):
    more = ["workload.max_output_tokens=40", "workload.num_sessions=7", "workload.think_time_s=0"]
    own = [*words, "fetch=always", *more]
    macro, single = (
        [request_record(t) for t in play(cluster_of(*own, f"macro_steps={on}"))] for on in ("true", "false")
    )
    assert macro == single and sum((row["fetch"] or {}).get("outcome") == "fetched" for row in single) > 3


def test_what_is_offered_waits_for_the_end_of_a_step_where_it_needs_what_is_not_free():
    """Where there is a DRAM tier, room for more than what is free is made by moving blocks there."""
    for dram, beside in ((0, [True, True, False]), (50, [True, False, False])):
        instance = cluster_of(*COLOCATED, "fetch=always", f"kvcache.num_dram_blocks={dram}").nodes[0].instance
        pool, transfers = instance.pool, instance.handoffs.transfers
        tokens = np.arange((pool.num_blocks - 4) * 16, dtype=np.int32)
        pool.publish(tokens, pool.alloc(pool.num_blocks - 4, ("test",)))
        pool.release_all(("test",))
        asks = [
            Ask((1, n), b"", n, 0, True, True, False, b"", transfers.geometry)
            for n in (4, pool.num_blocks, pool.num_blocks + 1)
        ]
        assert [transfers.has_room_beside(ask) for ask in asks] == beside
        assert not transfers.has_room_beside(msgspec.structs.replace(asks[0], best_effort=False))


def test_the_time_that_fetching_saves_is_the_one_predicted():
    """Both ways of the same requests, one session at a time: what Eq. 2 chooses is what was faster."""
    right, one = [], ["workload.num_sessions=1", "workload.num_turns=4"]
    without = play(cluster_of(*COLOCATED, "fetch=never", *one))
    for gb_per_s in (3e-5, 1.2e-4, 3e-4, 1e-2):
        always = play(cluster_of(*COLOCATED, "fetch=always", *one, f"link.gb_per_s={gb_per_s}"))
        for fetched, computed in zip(always, without, strict=True):
            record = fetched.stats.fetch
            if record is not None and abs(record.fetch_s / record.compute_s - 1) > 0.1:
                ttft_ns = [t.token_times_ns[0] - t.arrival_ns for t in (fetched, computed)]
                right.append((ttft_ns[0] <= ttft_ns[1]) == (record.fetch_s <= record.compute_s))
    assert len(right) > 8 and np.mean(right) >= 0.95


def test_requests_that_come_together_are_decided_together():
    instance = cluster_of(*COLOCATED, "fetch=always").nodes[0].instance
    for number in range(3):
        tokens = pack_tokens(np.arange(50, dtype=np.int32) + number)
        elsewhere = (Holding(1, 48),) if number else ()
        instance.receive(Dispatch(str(number), 0, "", tokens, SamplingParams(), 0, None, elsewhere))
    batch = instance.schedule(0)
    assert [request.request_id for request in batch.requests] == ["0"]
    sent = instance.drain_peer_outbox()
    assert [(to, message.limit, message.num_held) for to, message in sent] == [(1, 48, 0)] * 2
    records = [entry.record for entry in instance.handoffs.fetches._open.values()]
    assert [record.num_in_batch for record in records] == [2, 2]
    assert records[0].fetch_s == records[1].fetch_s > 0


def test_a_decision_is_in_the_requests_line_and_its_wait_is_a_phase(tmp_path):
    timelines = play(cluster_of(*COLOCATED, "fetch=always"))
    lines = [json.loads(json.dumps(request_record(t))) for t in timelines]
    fetches = [line for line in lines if line["fetch"] is not None]
    assert fetches
    for line in fetches:
        fetch = line["fetch"]
        assert fetch["outcome"] == "fetched" and fetch["actual_fetch_s"] > 0 and fetch["compute_s"] > 0
        assert line["queued_s"] < line["fetch_end_s"] <= line["first_scheduled_s"]
        assert line["num_fetched"] == fetch["num_fetched"]


def test_instances_that_fetch_nothing_have_no_transport():
    assert local(*COLOCATED).cluster().transport is None
    assert local("cluster=colocated_1").cluster().transport is None


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ([*COLOCATED, "index=none"], "index=none"),
        ([*COLOCATED, "index_source=none"], "index_source=none"),
        (["cluster=colocated_1"], "cluster.roles=['colocated']"),
        (["cluster=1p1d", "mode=pd_caching_1"], "cluster.roles=['prefill', 'decode']"),
        (["cluster=2p1d", "mode=pd_basic"], "mode=pd_basic"),
    ],
)
@pytest.mark.parametrize("word", ["always", "cost"])
def test_fetching_where_nobody_can_be_asked_is_a_contradiction(words, other, word):
    load_config([*WORKLOAD, *words])
    with pytest.raises(ConfigError, match=re.escape(f"fetch={word} contradicts ") + ".*" + re.escape(other)):
        load_config([*WORKLOAD, *words, f"fetch={word}"])


@pytest.mark.parametrize(
    "words",
    [
        ["cluster=1p1d", "mode=pd_caching_2"],
        ["cluster=2p1d", "mode=pd_caching_1"],
        ["cluster=colocated_2"],
        ["cluster=colocated_2", "policy=prompt_tree"],  # the paper's: it seldom finds anything
    ],
)
def test_fetching_where_somebody_else_caches_is_none(words):
    load_config([*WORKLOAD, *words, "fetch=cost"])


@pytest.mark.parametrize("source", ["optimistic", "exact"])
@pytest.mark.parametrize("place", [COLOCATED, PREFILL], ids=["colocated", "prefill"])
def test_the_global_schedulers_trees_tell_who_holds_more(place, source):
    """Without the stand-in: what is said to be elsewhere is asked for, and is there."""
    timelines = play(local(*place, "fetch=always", f"index_source={source}").cluster())
    assert_right(timelines)
    assert sum(t.stats.num_fetched for t in timelines) > 0


THREE = ("cluster.roles=[colocated,colocated,colocated]", "mode=colocated", "policy=random")
MANY_TURNS = ["workload.num_turns=6", "workload.num_sessions=7"]


class Believing(KnowingCluster):
    """One that believes of who holds least of a prompt that it has all of it."""

    def _holdings(self, node, tokens):
        least, *others = sorted(super()._holdings(node, tokens), key=lambda h: h.num_tokens)
        return [Holding(least.instance, len(tokens)), *others]


def went_on(timelines):
    """The last decisions for requests of which somebody was asked in vain."""
    return [record for record in records(timelines) if record.earlier]


def assert_true(record):
    """Each holder was asked once, with nothing in vain but at last, one decision after the other."""
    holders = [one.holder for one in record.decisions]
    assert len(set(holders)) == len(holders) and all(one.earlier == () for one in record.earlier)
    for before, after in itertools.pairwise(record.decisions):
        assert before.outcome in ("refused", "failed") and before.chose_fetch and before.reason
        assert before.ended_ns == after.began_ns and after.num_in_batch == 1 and after.num_held > after.num_cached


@pytest.mark.parametrize("fetch", ["always", "cost"])
def test_who_is_refused_asks_the_next_holder_and_every_decision_is_on_record(fetch):
    timelines = play(cluster_of(*THREE, f"fetch={fetch}", *MANY_TURNS, kind=Believing))
    assert_right(timelines, *MANY_TURNS)
    found = went_on(timelines)
    assert {record.outcome for record in found} >= {"fetched"}
    for record in found:
        assert_true(record)
        assert len(record.earlier) == 1 and "tokens are held" in record.earlier[0].reason
    served = [t for t in timelines if t.stats.fetch in found and t.stats.fetch.outcome == "fetched"]
    assert all(t.stats.num_fetched == t.stats.fetch.num_fetched > 0 for t in served)


def test_each_who_was_named_is_asked_once_and_then_the_prompt_is_computed():
    cluster = cluster_of(*THREE, "fetch=always", "workload.num_turns=1")
    cluster.promised = 48  # which nobody has, in any first turn
    asked = []
    timelines = play(cluster, lambda cluster: asked.extend(
        key for node in cluster.nodes for key in node.instance.handoffs.fetches._open if key not in asked))  # fmt: skip
    assert_right(timelines)
    assert len(records(timelines)) == len(timelines) and len(asked) == 2 * len(timelines)
    for record in records(timelines):
        assert_true(record)
        assert [one.outcome for one in record.decisions] == ["refused", "refused"]


def test_who_does_not_answer_is_given_up_at_the_deadline_and_the_next_holder_is_asked():
    cluster = cluster_of(*THREE, "fetch=always", kind=Believing)
    cluster.faults = MessageFaults(np.random.default_rng(0), drop=1.0, kinds=["Fetch"], limit=10_000)
    timelines = play(cluster)
    assert_right(timelines)
    found = went_on(timelines)
    assert found and all(one.ended_ns - one.began_ns == 500_000_000 for r in found for one in r.decisions)
    for record in found:
        assert_true(record)
        assert record.outcome == "failed"


WORTH_S = 80 * 0.00003  # of 80 tokens' prefill, by `fixed`


class WorthFiveBlocks(FetchPolicy):
    """Fetches what would take as long to compute as five blocks do."""

    def fetches(self, fetch_s, compute_s):
        return compute_s >= WORTH_S


def test_the_next_decision_is_priced_by_what_the_next_holder_has():
    """It may be to compute."""
    words = [*THREE, "~fetch", "+fetch={_target_: " + f"{__name__}.WorthFiveBlocks}}", *MANY_TURNS]
    timelines = play(cluster_of(*words, kind=Believing))
    assert_right(timelines, *MANY_TURNS)
    found = went_on(timelines)
    assert {"computed", "fetched"} <= {record.outcome for record in found}
    for record in found:
        assert record.chose_fetch == (record.compute_s >= WORTH_S) and record.compute_s < record.earlier[0].compute_s


@pytest.mark.parametrize("faults", [{}, {"drop": 0.3}], ids=["refused", "lost"])
def test_macro_steps_change_nothing_where_several_are_asked(faults):
    rows = []
    for on in ("true", "false"):
        more = ["workload.max_output_tokens=40", *MANY_TURNS]
        cluster = cluster_of(*THREE, "fetch=always", *more, f"macro_steps={on}", kind=Believing)
        cluster.faults = MessageFaults(np.random.default_rng(0), **faults, kinds=["Fetch", "Refuse"], limit=40)
        timelines = play(cluster)
        rows.append([request_record(t) for t in timelines])
        assert len(went_on(timelines)) > 3
    assert rows[0] == rows[1]


def test_a_client_may_cancel_while_the_next_holder_is_asked():
    words = [*THREE, "fetch=always", "link.gb_per_s=0.0001", *MANY_TURNS]
    cluster, cancelled = cluster_of(*words, kind=Believing), set()

    def cancel(cluster):
        for node in cluster.nodes:
            for entry in node.instance.handoffs.fetches._open.values():
                if entry.record.earlier and len(cancelled) < 2:
                    cancelled.add(entry.request.request_id)
                    cluster._to_scheduler(Cancel(entry.request.request_id))

    timelines = play(cluster, cancel)
    assert len(cancelled) == 2
    for t in timelines:
        assert (t.reason is FinishReason.ABORTED) == (t.request_id in cancelled)
        assert not t.succeeded or t.token_ids.tolist() == expected(*MANY_TURNS)[t.request_id]


def test_decisions_in_vain_are_in_the_requests_line_and_count_in_the_report():
    cluster = cluster_of(*THREE, "fetch=always", "workload.rate=20", kind=Believing)
    timelines = play(cluster)
    lines = [json.loads(json.dumps(request_record(t)["fetch"])) for t in timelines]
    earlier = [one for line in lines if line for one in line["earlier"]]
    assert len(earlier) == len(went_on(timelines)) > 0
    assert all(one["outcome"] == "refused" and one["actual_fetch_s"] is None and not one["earlier"] for one in earlier)
    counts = build_report(timelines, [], wall_s=1.0)["fetches"]
    assert counts["refused"] >= len(earlier) and counts["fetched"] == sum(
        record.outcome == "fetched" for record in records(timelines)
    )
