"""A store, an instance that keeps KV and serves nobody: the same answers with it as without, whatever goes wrong."""

import functools
import io
import json

import numpy as np
import pytest
from cluster.playing import at_random, nothing_is_left, play, rows_of, scheduled, tokens_of
from rich.console import Console

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.metrics.table import print_report
from memserve.request import Role
from memserve.sched.routing import Policy
from memserve.sched.scaling import Add, Drain
from memserve.transfer import MessageFaults

WORKLOAD = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=8", "workload.num_turns=3",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=12", "workload.rate=10",
    "transfer.retry_s=0.05", "transfer.deadline_s=0.5", "transfer.patience_s=5", "workload.think_time_s=0.05",
]  # fmt: skip
STORE = ["store=write_through", "fetch=always", "+per_role.store.kvcache.num_dram_blocks=44"]
PLACES = {
    "colocated": ["cluster.roles=[colocated,store,colocated]", "policy=round_robin"],
    "caching 1": ["cluster.roles=[store,prefill,prefill,decode]", "mode=pd_caching_1"],
    "caching 2": ["cluster.roles=[prefill,prefill,decode,store]", "mode=pd_caching_2"],
    "caching 3": ["cluster.roles=[prefill,prefill,decode,store]", "mode=pd_caching_3"],
}
SMALL = ["kvcache.num_hbm_blocks=24"]  # so that what is kept locally is soon evicted
SLOW = ["link.gb_per_s=0.001", "workload.rate=100"]  # so that much happens while KV is on its way


@functools.cache
def local(*words):
    return LocalCluster(load_config([*WORKLOAD, *words]))


def with_store(name, *words):
    return local(*PLACES[name], *STORE, *words)


@functools.cache
def expected():
    return tokens_of(play(local("cluster=colocated_1", "index=none").cluster()))


def assert_answered(timelines, num_requests=24):
    assert len(timelines) == num_requests == len(expected())
    for timeline in timelines:
        assert timeline.succeeded and timeline.token_ids.tolist() == expected()[timeline.request_id]


def store_of(cluster):
    return next(node for node in cluster.nodes if node.instance.role is Role.STORE)


GRANULARITIES = ["by_layer", "by_request", "packed"]


def from_store(cluster, timelines):
    """Requests that found KV in the store."""
    fetches = [t.stats.fetch for t in timelines if t.stats is not None and t.stats.fetch is not None]
    store = next(m.incarnation for m in cluster.members.members if m.role is Role.STORE)
    return [fetch for fetch in fetches if fetch.outcome == "fetched" and fetch.holder == store]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", PLACES)
def test_answers_are_the_same_with_a_store_that_evicts_beside_instances_that_do(name, granularity):
    source = ["optimistic", "exact"][([*PLACES].index(name) + GRANULARITIES.index(granularity)) % 2]
    system = with_store(name, *SMALL, f"index_source={source}", f"granularity={granularity}")
    cluster = system.cluster()
    timelines = play(cluster)
    assert_answered(timelines)
    nothing_is_left(cluster)
    pool = store_of(cluster).instance.pool.stats()
    assert pool.num_evicted > 0 and pool.num_indexed <= 44
    if name != "caching 2":  # in which decode instances hold more than anybody else
        assert from_store(cluster, timelines)
    assert sum(s.stats.num_evicted_blocks for s in cluster.summaries() if s.stats.role != Role.STORE) > 0


@pytest.mark.parametrize("eviction", ["lfu", "fifo", "cost_aware"])
@pytest.mark.parametrize("name", ["colocated", "caching 3"])
def test_answers_are_the_same_whatever_a_store_evicts_first(name, eviction):
    cluster = with_store(name, *SMALL, f"+eviction@per_role.store.eviction={eviction}").cluster()
    timelines = play(cluster)
    assert_answered(timelines)
    nothing_is_left(cluster)
    assert store_of(cluster).instance.pool.stats().num_evicted > 0 < len(from_store(cluster, timelines))


@pytest.mark.parametrize("words", [[], SLOW, [*SLOW, "store.max_waiting=1"]], ids=["fast", "slow", "few may wait"])
@pytest.mark.parametrize("name", ["colocated", "caching 3"])
def test_macro_steps_change_nothing_beside_a_store(name, words):
    more = [*SMALL, *words, "workload.max_output_tokens=40"]
    results = [(cluster := system.cluster(), system.play(cluster)) for on in ("true", "false")
               for system in [with_store(name, *more, f"macro_steps={on}")]]  # fmt: skip
    reports = [{**result.report, "wall_s": None} for _, result in results]
    assert reports[0] == reports[1] and reports[0]["num_failed"] == 0 < reports[0]["store"]["received"]["tokens"]
    assert rows_of(results[0][1].timelines) == rows_of(results[1][1].timelines)
    held = [[(t.tobytes(), b.tolist()) for t, b in store_of(c).instance.pool.index.iter_prefixes()] for c, _ in results]
    assert held[0] == held[1]


@pytest.mark.parametrize("kind", ["Fetch", "Ask", "Grant", "Done", "Inserted", "Refuse"])
@pytest.mark.parametrize("fault", ["drop", "repeat", "delay"])
def test_answers_survive_lost_repeated_and_late_messages_to_and_from_a_store(kind, fault):
    name = ["colocated", "caching 3"][(len(kind) + len(fault)) % 2]
    cluster = with_store(name, *SMALL).cluster()
    rng = np.random.default_rng(0)
    cluster.faults = MessageFaults(rng, **{fault: 0.7}, delay_ns=100_000_000, kinds=[kind], limit=40)
    assert_answered(play(cluster))
    nothing_is_left(cluster)


@pytest.mark.parametrize("name", ["colocated", "caching 3"])
def test_a_store_may_die_at_any_moment_and_the_others_go_on_without_it(name):
    system = with_store(name, *SMALL, *SLOW)
    num_lost = 0
    for after in range(2, 400, 57):
        cluster, count = system.cluster(), iter(range(10**6))
        label = store_of(cluster).instance.label

        def act(cluster, number, count=count, after=after, label=label):
            if next(count) == after:
                cluster.crash(label)

        timelines = play(cluster, act)
        assert_answered(timelines)
        assert all(t.attempt == 0 for t in timelines), "nobody was served there"
        nothing_is_left(cluster)
        num_lost += cluster.members.counts()["lost"]
    assert num_lost > 3


def test_who_is_served_by_a_store_that_dies_has_its_kv_from_the_next_holder_or_computes_it():
    system = with_store("colocated", "link.gb_per_s=0.0005", "cluster.roles=[colocated,store,colocated,colocated]")
    outcomes = set()
    for nth in range(0, 9, 2):
        cluster, label, seen = system.cluster(), "store-1", set()
        store = store_of(cluster).incarnation

        def act(cluster, number, seen=seen, label=label, store=store, nth=nth):
            for node in cluster.nodes:
                entries = node.instance.handoffs.fetches._open.values()
                seen |= {e.message.ticket for e in entries if e.record.holder == store}
            if len(seen) > nth and cluster.members.counts()["lost"] == 0:
                cluster.crash(label)

        timelines = play(cluster, act)
        assert_answered(timelines)
        nothing_is_left(cluster)
        for t in timelines:
            for record in t.stats.fetch.earlier if t.stats.fetch is not None else ():
                assert (record.holder, record.outcome) == (store, "failed") and "is gone" in record.reason
                outcomes.add(t.stats.fetch.outcome)
    assert "fetched" in outcomes


@pytest.mark.parametrize("name", PLACES)
def test_a_store_may_be_silent_for_a_while(name):
    """Longer than the deadline of what was asked of it."""
    cluster = with_store(name, *SMALL, *SLOW).cluster()
    label = store_of(cluster).instance.label
    cluster.call_at(100_000_000, lambda: cluster.stop(label))
    cluster.call_at(900_000_000, lambda: cluster.resume(label))
    timelines = play(cluster)
    assert_answered(timelines)
    nothing_is_left(cluster)


@pytest.mark.parametrize(
    ("name", "departure"),
    [("colocated", "wait"), ("caching 1", "migrate"), ("caching 3", "wait"), ("caching 3", "migrate")],
)
def test_whoever_else_comes_goes_and_migrates_every_request_is_answered_right(name, departure):
    roles = {"colocated": "[colocated,colocated,store]"}.get(name, "[prefill,prefill,decode,decode,store]")
    words = [f"cluster.roles={roles}", *PLACES[name][1:], *STORE, "scaling=schedule", "scaling.changes=[]"]
    system = local(*words, f"departure={departure}", *SLOW, "granularity=by_layer")
    num_left = num_found = 0
    for seed in range(2):
        cluster = system.cluster()
        timelines = play(cluster, at_random(seed, 0.1))
        assert_answered(timelines)
        nothing_is_left(cluster)
        num_left += cluster.members.counts()["left"]
        num_found += len(from_store(cluster, timelines))
    assert num_left > 1 and num_found > 0


def test_a_store_is_neither_drained_nor_switched_nor_added_by_name():
    cluster = with_store("colocated", "scaling=schedule", "scaling.changes=[]").cluster()
    with pytest.raises(ValueError, match="instance 'store-1' is a store: expected one that serves requests"):
        cluster.change(Drain("store-1"))
    with pytest.raises(ValueError, match="role store: expected one of the cluster's, colocated"):
        cluster.change(Add(Role.STORE))
    for change, said in (
        ({"at_s": 1, "drain": "store-1"}, "drain store-1: expected an instance that serves requests"),
        ({"at_s": 1, "switch": "colocated-0", "to": "store"}, "expected one of colocated, prefill, decode"),
        ({"at_s": 1, "add": "store"}, "expected one of colocated, prefill, decode"),
    ):
        with pytest.raises(ConfigError, match=said):
            LocalCluster(load_config([*WORKLOAD, *PLACES["colocated"], *STORE, *scheduled(change)]))


def test_a_scheduled_crash_of_a_store_is_performed():
    system = local(*PLACES["colocated"], *STORE, *scheduled({"at_s": 0.6, "crash": "store-1"}))
    report = system.run()
    assert report["num_failed"] == 0 and report["membership"]["lost"] == 1
    assert report["store"]["num_blocks"] is None and report["store"]["received"]["tokens"] > 0


SEEN = []  # labels that a policy was shown


class Looking(Policy):
    """The first instance; keeps whom it could have chosen."""

    def choose(self, request, cluster, rng):
        SEEN.append(cluster.labels)
        return 0


@pytest.mark.parametrize("name", PLACES)
def test_a_store_is_no_candidate_of_any_policy(name):
    SEEN.clear()
    own = f"{__name__}.Looking"
    LocalCluster(load_config([*WORKLOAD, *PLACES[name], *STORE, f"policy._target_={own}",
                              f"decode_policy._target_={own}"])).run()  # fmt: skip
    assert len(SEEN) >= 24 and not any("store" in label for labels in SEEN for label in labels)


@pytest.mark.parametrize("by", ["by_load", "switch_roles"])
def test_scaling_by_load_counts_no_store(by):
    place = PLACES["caching 3"]
    words = {"by_load": ["scaling.max_instances=3"], "switch_roles": []}[by]
    report = local(*place, *STORE, f"scaling={by}", *words).run()
    assert report["num_failed"] == 0 and not any(row["role"] == "store" for row in report["instances"][4:])


@pytest.mark.parametrize("source", ["optimistic", "exact"])
@pytest.mark.parametrize("name", PLACES)
def test_the_global_scheduler_knows_what_a_store_holds(name, source):
    """There is room for all, and nothing is on its way any more."""
    cluster = local(*PLACES[name], *STORE[:2], "+per_role.store.kvcache.num_dram_blocks=1000",
                    f"index_source={source}").cluster()  # fmt: skip
    timelines = play(cluster)
    index = store_of(cluster).instance.pool.index
    for timeline in timelines:
        tokens = np.concatenate([timeline.prompt_token_ids, timeline.token_ids]) if hasattr(
            timeline, "prompt_token_ids") else timeline.token_ids  # fmt: skip
        held = cluster.scheduler.groups._stores.holdings(tokens, cluster.now_ns)
        found = index.peek(tokens, max(len(tokens) - 1, 0)).num_tokens
        assert [h.num_tokens for h in held] == ([found] if found else [])
    for tokens, _ in index.iter_prefixes():
        (held,) = cluster.scheduler.groups._stores.holdings(np.append(tokens, 0), cluster.now_ns)
        assert held.num_tokens == len(tokens) and held.instance == store_of(cluster).incarnation


@pytest.mark.parametrize("name", PLACES)
def test_what_a_store_has_is_not_sent_again_and_every_whole_block_that_takers_cached_is_there(name):
    cluster = local(*PLACES[name], *STORE[:2], "+per_role.store.kvcache.num_dram_blocks=1000").cluster()
    play(cluster)
    pool = store_of(cluster).instance.pool
    store, num_tokens = cluster.members.labels.index(store_of(cluster).instance.label), 0
    for summary in cluster.summaries():
        assert summary.num_dropped_deposits == 0
        if (counts := summary.sent.get(store)) is not None:
            num_tokens += counts.tokens
            assert counts.declined == counts.failed == 0
    assert 16 * pool.index.num_blocks <= num_tokens < 1.2 * 16 * pool.index.num_blocks  # some came from two at a time
    for node in cluster.nodes:
        if node.instance.role in (Role.COLOCATED, Role.PREFILL):
            for tokens, _ in node.instance.pool.index.iter_prefixes():
                assert pool.index.peek(tokens).num_tokens == len(tokens)


def test_a_store_has_dram_alone_and_computes_nothing():
    cluster = with_store("caching 3").cluster()
    play(cluster)
    node = store_of(cluster)
    pool = node.instance.pool
    assert pool.num_blocks == 0 and pool.allocator.num_dram_blocks == 44 and pool.index.num_blocks > 0
    assert node.busy_ns == node.instance.scheduler.counts.steps == 0
    summary = node.summary(cluster.now_ns)
    assert sum(summary.occupancy[-1].dram.values()) == 44 and sum(summary.occupancy[-1].hbm.values()) == 0


@pytest.mark.parametrize("name", ["colocated", "caching 3"])
def test_an_instance_gives_one_prefix_at_a_time_and_what_waits_too_long_is_dropped_and_counted(name):
    system = with_store(name, *SLOW, "link.gb_per_s=0.00005", "store.max_waiting=1", "fetch=cost")
    cluster, most = system.cluster(), 0

    def act(cluster, number):
        nonlocal most
        asks = [message.ticket[0] for message in store_of(cluster).instance.handoffs.transfers.open_asks]
        most = max(most, max(map(asks.count, asks), default=0))

    assert_answered(play(cluster, act))
    nothing_is_left(cluster)
    assert most == 1 and sum(s.num_dropped_deposits for s in cluster.summaries()) > 0


def test_no_request_waits_for_what_goes_to_a_store():
    """On a link of 50 kB a second, where nothing is worth to be fetched."""
    words = ["link.gb_per_s=0.00005", "fetch=cost"]
    without = local("cluster=colocated_2", "policy=round_robin", *words).run()
    beside = with_store("colocated", *words).run()
    assert beside["store"]["received"]["seconds"] > 1 and beside["fetches"]["fetched"] == 0
    for figure in ("ttft_s", "tpot_s", "jct_s", "tokens", "hit_ratio", "skew"):
        assert beside[figure] == without[figure]


def test_the_report_has_what_a_store_did_and_counts_it_as_no_instance_that_serves():
    words = ["policy=round_robin", *SMALL]
    without = local("cluster=colocated_2", *words).run()
    system = with_store("colocated", *SMALL)
    report, out = system.run(), io.StringIO()
    store, row = report["store"], report["instances"][1]
    assert without["store"] is None
    assert 0 < store["fetched_tokens"] <= min(store["sent"]["tokens"], report["tokens"]["fetched"])
    assert store["hit_ratio"] == store["fetched_tokens"] / report["tokens"]["prompt"]
    assert store["num_blocks"] == 44 >= store["num_indexed_blocks"] > 0 < store["num_evicted_blocks"]
    assert store["received"]["bytes"] == 32 * store["received"]["tokens"]
    assert (row["id"], row["num_requests"], row["busy_s"]) == ("store-1", 0, 0)
    served = [report["instances"][0]["busy_s"], report["instances"][2]["busy_s"]]
    assert report["skew"]["busy_s"] == max(served) / np.mean(served)
    assert report["membership"]["instance_s"] == pytest.approx(2 * report["makespan_s"])
    print_report(report, console=Console(file=out, width=200))
    assert f"{store['fetched_tokens']:,} tokens fetched by {store['fetches']} requests" in out.getvalue()
    assert "to the store" in out.getvalue() and "from the store" in out.getvalue()
    json.dumps(report, allow_nan=False)


def test_of_equal_holders_the_store_is_asked():
    """Three turns in turn at two instances: the second one's beginning is at the first instance and in the store."""
    cluster = with_store("colocated", "workload.num_sessions=1").cluster()
    timelines = play(cluster)
    assert len(from_store(cluster, timelines)) == len([t for t in timelines if t.stats.fetch is not None]) > 0


def test_tensor_parallel_instances_share_a_store_of_whole_blocks():
    """A store is one rank, whatever `cluster.tensor_parallel.every` says, and holds all heads of a block."""
    words = ["tokens=workload", "geometry=llama3_8b", "cluster.tensor_parallel.every=2", *SMALL]
    report = with_store("caching 3", *words).run()
    received = report["store"]["received"]
    assert report["num_failed"] == 0 < report["store"]["fetches"]
    assert received["bytes"] == received["tokens"] * 32 * 2 * 8 * 128 * 2


REFUSED = {
    "cluster.roles=[colocated,store] fetch=cost": "contradicts store=none",
    "store=write_through": r"store=WriteThrough contradicts cluster.roles=\['colocated'\]",
    "cluster.roles=[colocated,store] store=write_through": "contradicts fetch=never",
    "cluster.roles=[store] store=write_through fetch=cost": "at least one role that serves requests",
    "cluster.roles=[colocated,store] store=write_through fetch=cost": "num_dram_blocks=0: expected an integer >= 1",
}
OF_A_STORE = {
    "+per_role.store.sched.token_budget=9": "per_role.store.sched.*expected one of eviction, kvcache",
    "+per_role.store.kvcache.num_hbm_blocks=9": "expected num_dram_blocks or dram_bytes, since a store has DRAM alone",
    "+per_role.store.kvcache.async_swap=true": "expected num_dram_blocks or dram_bytes",
    "+per_role.store.kvcache.dram_bytes=1": "expected one of them",
    "store.max_waiting=0": "store.max_waiting=0: expected an integer >= 1",
    "store.max_incoming=0": "store.max_incoming=0: expected an integer >= 1",
    "index=none": "contradicts index=none",
    "index_source=none": "contradicts index_source=none",
    "index=hash": "index=HashIndex contradicts a DRAM tier|index=hash contradicts a DRAM tier",
    "+cluster.tensor_parallel.store=2": "store",
    "cluster.store=here:9 cluster.member=0 exec=distributed transport=gloo": "contradicts cluster.store=here:9",
    "model.device=cuda exec=distributed transport=gloo": "contradicts model.device=cuda between processes",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_store_that_nothing_goes_to_or_comes_from_is_refused_by_name(words):
    with pytest.raises(ConfigError, match=REFUSED[words]):
        LocalCluster(load_config(["exec=simulated", *words.split()]))


@pytest.mark.parametrize("word", OF_A_STORE)
def test_what_a_store_cannot_be_is_refused_by_name(word):
    with pytest.raises(ConfigError, match=OF_A_STORE[word]):
        LocalCluster(load_config([*WORKLOAD, *PLACES["colocated"], *STORE, *word.split()]))


@pytest.mark.parametrize(
    "words", ["index=none", "index_source=none", "cluster.roles=[prefill,decode,store] mode=pd_basic"]
)
def test_what_forbids_fetching_is_said_to_forbid_a_store_as_well(words):
    """Without fetching, which would be the other way out, a store is refused."""
    with pytest.raises(ConfigError, match="fetch=always contradicts .* expected fetch=never and no store among"):
        LocalCluster(load_config([*WORKLOAD, *PLACES["colocated"], *STORE, *words.split()]))


def test_a_store_may_be_of_so_many_bytes():
    system = local(*PLACES["colocated"], *STORE[:2], "+per_role.store.kvcache.dram_bytes=32KiB")
    cluster = system.cluster()
    assert store_of(cluster).instance.pool.allocator.num_dram_blocks == 32 * 1024 // 512
    assert cluster.scheduler.groups._stores.tree._max_blocks == 64


def test_the_model_answers_as_without_a_store():
    words = ["model=tiny", "step_time=model", "workload.num_sessions=3", "kvcache.num_hbm_blocks=60"]
    alone = LocalCluster(load_config([*words, "index=none"])).run_once()
    stored = LocalCluster(load_config([*words, *PLACES["caching 3"], *STORE])).run_once()
    answers = [tokens_of(result.timelines) for result in (alone, stored)]
    assert answers[0] == answers[1] and stored.report["store"]["fetched_tokens"] > 0


def test_what_a_store_sends_is_among_the_activity_of_the_run():
    system = with_store("colocated", *SMALL)
    result = system.play(system.cluster())
    spans = [span for span in result.activity if span.instance == "store-1"]
    sent = result.report["store"]["sent"]
    assert sum(span.figures["tokens"] for span in spans) == sent["tokens"] > 0 and {s.to for s in spans} <= {
        "colocated-0", "colocated-2"
    }  # fmt: skip
