"""Several stores: the same answers as with one, each prefix whole in one of them, and the others go on without one."""

import io

import pytest
from cluster.playing import nothing_is_left, play, rows_of
from cluster.test_store import SLOW, SMALL, assert_answered, local
from rich.console import Console

from memserve.metrics.table import print_report
from memserve.request import Role

STORES = ["fetch=always", "+per_role.store.kvcache.num_dram_blocks=30"]
PLACES = {
    "colocated": ["cluster.roles=[colocated,store,colocated,store,store]", "policy=round_robin"],
    "caching 1": ["cluster.roles=[store,prefill,store,prefill,decode]", "mode=pd_caching_1"],
    "caching 3": ["cluster.roles=[prefill,prefill,decode,store,store]", "mode=pd_caching_3"],
}
POLICIES = ["write_through", "write_through_selective", "write_back"]


def several(name, *words, store="write_through"):
    return local(*PLACES[name], f"store={store}", *STORES, *words)


def stores_of(cluster):
    return [node for node in cluster.nodes if node.instance.role is Role.STORE]


def read_from(timelines):
    """Of whom requests had KV."""
    fetches = [t.stats.fetch for t in timelines if t.stats is not None and t.stats.fetch is not None]
    return {fetch.holder for fetch in fetches if fetch.outcome == "fetched"}


@pytest.mark.parametrize("store", POLICIES)
@pytest.mark.parametrize("name", PLACES)
def test_answers_are_the_same_with_several_stores_that_evict(name, store):
    source = ["optimistic", "exact"][([*PLACES].index(name) + POLICIES.index(store)) % 2]
    cluster = several(name, *SMALL, f"index_source={source}", store=store).cluster()
    timelines = play(cluster, check=True)
    assert_answered(timelines)
    nothing_is_left(cluster)
    stores = stores_of(cluster)
    assert all(node.instance.pool.index.num_blocks for node in stores)
    num_read = len(read_from(timelines) & {node.incarnation for node in stores})
    assert num_read > 1 or store != "write_through"  # by the others little is found in pools of this size


@pytest.mark.parametrize("name", ["colocated", "caching 3"])
def test_macro_steps_change_nothing_beside_several_stores(name):
    more = [*SMALL, *SLOW, "workload.max_output_tokens=40"]
    systems = [several(name, *more, f"macro_steps={on}") for on in ("true", "false")]
    results = [system.play(system.cluster()) for system in systems]
    reports = [{**result.report, "wall_s": None} for result in results]
    assert reports[0] == reports[1] and reports[0]["num_failed"] == 0 < reports[0]["store"]["received"]["tokens"]
    assert rows_of(results[0].timelines) == rows_of(results[1].timelines)


def test_a_conversation_s_turns_go_to_the_store_where_the_first_went():
    """One instance has them all and evicts nothing, so that no block is in two stores."""
    words = ["cluster.roles=[colocated,store,store,store]", "++per_role.store.kvcache.num_dram_blocks=300"]
    cluster = several("colocated", *words).cluster()
    assert_answered(play(cluster))
    own, *stores = [node.instance.pool.index for node in cluster.nodes]
    assert sum(index.num_blocks for index in stores) == own.num_blocks > 0
    assert sum(index.num_blocks > 0 for index in stores) > 1
    for tokens, _ in own.iter_prefixes():
        assert sorted(index.peek(tokens).num_tokens for index in stores) == [0, 0, len(tokens)]


@pytest.mark.parametrize("name", ["colocated", "caching 3"])
@pytest.mark.parametrize("store", POLICIES)
def test_one_of_several_may_die_at_any_moment_and_what_it_had_is_offered_to_another(name, store):
    system = several(name, *SMALL, *SLOW, store=store)
    num_lost = 0
    for after in range(2, 400, 79):
        cluster = system.cluster()
        lost = stores_of(cluster)[after % 2]

        def act(cluster, number, after=after, lost=lost):
            if number == after:
                cluster.crash(lost.instance.label)

        timelines = play(cluster, act)
        assert_answered(timelines)
        assert all(t.attempt == 0 for t in timelines), "nobody was served there"
        nothing_is_left(cluster)
        if cluster.members.counts()["lost"]:
            num_lost += 1
            for node in cluster.nodes:
                if node.instance.role in (Role.COLOCATED, Role.PREFILL):
                    deposits = node.instance.handoffs.deposits
                    assert lost.incarnation not in deposits._those_here()
                    assert lost.incarnation not in node.instance.pool.allocator.offered_to
    assert num_lost > 2


def test_all_may_die_and_the_instances_go_on_alone():
    cluster = several("colocated", *SMALL, *SLOW).cluster()

    def act(cluster, number):
        for after, store in zip((40, 60, 90), stores_of(cluster), strict=False):
            if number == after:
                cluster.crash(store.instance.label)

    timelines = play(cluster, act)
    assert_answered(timelines)
    nothing_is_left(cluster)


def test_the_report_adds_stores_up_and_says_how_evenly_they_share():
    system = several("colocated", *SMALL)
    report, out = system.run(), io.StringIO()
    store = report["store"]
    rows = [row for row in report["instances"] if row["role"] == "store"]
    assert (store["num_stores"], store["num_stores_left"], store["num_blocks"]) == (3, 3, 90)
    assert store["num_indexed_blocks"] == sum(row["num_indexed_blocks"] for row in rows)
    assert store["num_evicted_blocks"] == sum(row["num_evicted_blocks"] for row in rows)
    assert 1 <= store["skew_received"] <= 3 and 1 <= store["skew_sent"] <= 3
    assert 0 < store["fetched_tokens"] <= store["sent"]["tokens"]
    print_report(report, console=Console(file=out, width=250))
    assert "3 stores" in out.getvalue() and "times the mean, and sent" in out.getvalue()


def test_one_that_is_lost_is_said_to_be():
    cluster = (system := several("colocated", *SMALL)).cluster()
    cluster.crash("store-1")
    report, out = system.play(cluster).report, io.StringIO()
    assert (report["store"]["num_stores"], report["store"]["num_stores_left"]) == (3, 2)
    assert report["store"]["num_blocks"] == 60
    print_report(report, console=Console(file=out, width=250))
    assert ", 1 gone" in out.getvalue()
