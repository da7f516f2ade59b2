"""Answers whose KV goes ahead of them: they stand still for a moment; nothing moves twice, is lost or left behind."""

import io

import numpy as np
import pytest
from cluster.playing import nothing_is_left, play, rows_of
from cluster.test_migration import LONG, PRESSURE, SCHEDULED, THREE, assert_answered, local, migrations_of
from cluster.test_rebalancing import RESTLESS
from rich.console import Console

from memserve.config.errors import ConfigError
from memserve.kvcache import Medium, address
from memserve.messages import Grant, PoolSize, pack_times
from memserve.metrics.migrations import stood_still_s
from memserve.metrics.table import print_report
from memserve.request import Request
from memserve.sampling_params import SamplingParams
from memserve.sched.migration import LiveMigration, MigrationPolicy, StopAndCopy
from memserve.sched.preemption import Recompute
from memserve.sched.publisher import Publisher
from memserve.served import Served

LIVE = "migration=live"


class Once(MigrationPolicy):
    """One copy goes ahead, however much is written meanwhile."""

    def copies_ahead(self, num_left, num_before):
        return num_before is None


ONCE = "migration._target_=cluster.test_live_migration.Once"


def drained(*words):
    """A cluster of which one instance has drained, and its timelines."""
    cluster = local(*SCHEDULED["colocated"], *LONG, "departure=migrate", *words).cluster()
    timelines = play(cluster, check=True)
    assert_answered(timelines, *LONG)
    nothing_is_left(cluster)
    return cluster, timelines


def pauses_s(timelines):
    return [pause_s for timeline in timelines for pause_s in stood_still_s(timeline)]


def sent_tokens(cluster):
    return sum(counts.tokens for summary in cluster.summaries() for counts in summary.sent.values())


@pytest.mark.parametrize("gb_per_s", [1e-4, 1e-5])
def test_an_answer_stands_still_for_the_last_of_its_kv_alone(gb_per_s):
    link = f"link.gb_per_s={gb_per_s}"
    (_, stopped), (_, live) = drained(link), drained(link, LIVE)
    assert len(pauses_s(live)) == len(pauses_s(stopped)) > 0
    assert max(pauses_s(live)) < 0.6 * max(pauses_s(stopped))


@pytest.mark.parametrize("word", [LIVE, ONCE])
def test_what_went_ahead_does_not_move_again(word):
    cluster, timelines = drained(word)
    moved = [m for m in migrations_of(timelines) if m.done]
    assert moved and all(0 < m.num_ahead < m.num_tokens for m in moved)
    assert sent_tokens(cluster) == sum(m.num_tokens for m in moved)


def test_a_policy_of_one_s_own_says_how_much_goes_ahead():
    """One copy: what is written while it is under way moves while the answer stands still."""
    link = "link.gb_per_s=1e-5"
    once, live = ([m for m in migrations_of(drained(link, word)[1]) if m.done] for word in (ONCE, LIVE))
    assert sum(m.num_tokens - m.num_ahead for m in once) > 2 * sum(m.num_tokens - m.num_ahead for m in live)


def test_copies_go_ahead_as_long_as_each_is_shorter_than_the_one_before():
    live = LiveMigration()
    assert live.copies_ahead(100, None) and live.copies_ahead(99, 100)
    assert not live.copies_ahead(100, 100) and not StopAndCopy().copies_ahead(1, None)


def test_who_is_declined_goes_on_as_if_nobody_had_asked():
    """All pools are as good as full: with `stop_and_copy` each that is declined has stopped for it."""
    many = ["workload.num_sessions=12", "workload.num_turns=1", "workload.max_output_tokens=60", "link.gb_per_s=1"]
    words = [*THREE["colocated"], *PRESSURE["recompute"], *many, "index_source=none", "policy=round_robin", RESTLESS]
    timelines = play(local(*words, LIVE).cluster())
    told = migrations_of(timelines)
    declined = [m for m in told if not m.done and not m.num_tokens]
    assert len(declined) > 3
    assert len(pauses_s(timelines)) <= len(told) - len(declined)


def test_an_answer_that_ends_while_its_kv_goes_ahead_has_ended():
    """The link takes longer than all of them together; what arrives is cached, and the router knows it."""
    words = [*THREE["colocated"], RESTLESS, LIVE, "link.gb_per_s=1e-6", "transfer.deadline_s=600"]
    cluster = local(*words).cluster()
    timelines = play(cluster)
    assert_answered(timelines)
    nothing_is_left(cluster)
    assert not any(m.done for m in migrations_of(timelines)) and sent_tokens(cluster) > 0


@pytest.mark.parametrize("name", SCHEDULED)
def test_two_runs_are_equal_to_the_nanosecond_and_macro_steps_change_nothing(name):
    words = [*SCHEDULED[name], *LONG, "departure=migrate", LIVE, "link.gb_per_s=1e-5"]
    runs = [play(local(*words, f"macro_steps={on}").cluster()) for on in ("true", "true", "false")]
    assert sum(m.num_ahead for m in migrations_of(runs[0])) > 0
    assert rows_of(runs[0]) == rows_of(runs[1]) == rows_of(runs[2])


def test_the_report_says_how_much_went_ahead():
    system = local(*SCHEDULED["colocated"], *LONG, "departure=migrate", LIVE)
    result = system.play(system.cluster())
    done = [m for m in migrations_of(result.timelines) if m.done]
    figures = result.report["migrations"]
    assert figures["ahead_tokens"] == sum(m.num_ahead for m in done) > 0
    out = io.StringIO()
    print_report(result.report, console=Console(file=out, width=150))
    assert f"({figures['ahead_tokens']:,} ahead)" in out.getvalue()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=colocated_2"], "LiveMigration contradicts departure=wait and rebalancing=none: no answer migrates"),
        (["cluster=colocated_2", "index=none"], "contradicts index=none: what goes ahead"),
        (["cluster.roles=[prefill,decode,decode]", "mode=pd_basic"], "contradicts mode PDBasic: what goes ahead"),
        (["cluster.roles=[prefill,decode,decode]", "mode=pd_caching_1"], "PDCaching1.* expected migration=stop_and"),
    ],
)
def test_where_nothing_can_go_ahead_it_is_refused(words, said):
    rule = [] if "no answer" in said else [RESTLESS]
    with pytest.raises(ConfigError, match=said):
        local(LIVE, *rule, *words)


@pytest.mark.parametrize("how", ["ahead of it", "with it"])
def test_what_a_migrating_answer_has_above_its_blocks_is_held_while_they_move_though_it_is_preempted(how):
    """Another cached its prompt first, and has ended: what eviction can free, it frees."""
    words = ["cluster=colocated_2", "policy=least_load", "rebalancing=by_answers", LIVE, "kvcache.num_hbm_blocks=8"]
    instance, _ = (node.instance for node in local(*words).cluster().nodes)
    pool, handoffs, first, size = instance.pool, instance.handoffs, ("request", "first", 0), instance.pool.block_size
    tokens = np.arange(3 * size + 1, dtype=np.int32)
    pool.publish(tokens[: 2 * size], pool.alloc(2, first))
    request = Request("late", tokens[: 2 * size], SamplingParams(max_tokens=2 * size))
    request.tokens.extend(tokens[2 * size :])
    request.block_table.extend(pool.alloc(3, request.holder))
    publisher = Publisher(pool, True)
    for num_computed in (2 * size, 3 * size):
        publisher.publish(request)
        request.num_computed = num_computed
    if how == "with it":
        handoffs.migrate(request, 1, None, Served(request, 0, None).stats("colocated-0"), 0)
        ((_, ask),) = handoffs.drain_outbox()
        addrs = address.encode(address.head(1, Medium.HBM), np.zeros(3, np.int64), np.arange(3))
        handoffs.receive(1, Grant(ask.ticket, pack_times(addrs), 0, PoolSize(8, 0)), {}, 0)
        handoffs.drop(request.request_id, "it goes on here", 0)
    else:
        handoffs.migrations.ask(request, 1)
        assert handoffs.migrations.stopping(lambda ids: [request], 0) == []
    pool.release_all(first)
    publisher.publish(request)
    Recompute().preempt(request, pool)
    assert pool.num_available == 3 and len(pool.alloc(3, first)) == 3
    pool.check()
