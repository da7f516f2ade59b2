"""What goes to a store: the hot beginning of prompts, or what is about to be evicted. The same answers with either."""

import numpy as np
import pytest
from cluster.playing import at_random, nothing_is_left, play, rows_of, tokens_of
from cluster.test_store import PLACES, SLOW, SMALL, WORKLOAD, assert_answered, from_store, local, store_of

from memserve import LocalCluster, RadixIndex, load_config
from memserve.config.errors import ConfigError
from memserve.kvcache.events import NobodyFollows
from memserve.request import SERVING, Role
from memserve.transfer import MessageFaults

KEEPS = ["fetch=always", "+per_role.store.kvcache.num_dram_blocks=44"]
SELECTIVE, BACK = "store=write_through_selective", "store=write_back"
POLICIES = [SELECTIVE, BACK]
TIERS = ["kvcache.num_dram_blocks=12", "kvcache.async_swap=true", "kvcache.swap_ahead_blocks=3"]


def with_policy(name, policy, *words):
    return local(*PLACES[name], policy, *KEEPS, *words)


def num_lost(cluster):
    """Tokens of blocks that takers evicted without having offered them."""
    takers = [node.instance.pool for node in cluster.nodes if node.instance.role in (Role.COLOCATED, Role.PREFILL)]
    return sum(pool.allocator.num_evicted_unoffered * pool.block_size for pool in takers)


def num_dropped(cluster):
    return sum(summary.num_dropped_deposits for summary in cluster.summaries())


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_same_whatever_goes_to_the_store(policy, name):
    source = ["exact", "optimistic"][([*PLACES].index(name) + POLICIES.index(policy)) % 2]
    cluster = with_policy(name, policy, *SMALL, f"index_source={source}").cluster()
    timelines = play(cluster)
    assert_answered(timelines)
    nothing_is_left(cluster)
    if name != "caching 2":  # in which decode instances hold more than anybody else
        assert store_of(cluster).instance.pool.index.num_blocks > 0
    if policy == BACK:
        assert num_dropped(cluster) == num_lost(cluster)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("eviction", ["lfu", "fifo", "cost_aware"])
def test_answers_are_the_same_whatever_goes_first(policy, eviction):
    name = ["colocated", "caching 3"][(POLICIES.index(policy) + len(eviction)) % 2]
    cluster = with_policy(name, policy, *SMALL, *TIERS, f"eviction={eviction}").cluster()
    assert_answered(play(cluster))
    nothing_is_left(cluster)


MACRO = {
    "fast": SMALL,
    "slow": [*SMALL, *SLOW],
    "tiers": [*SMALL, *TIERS],
    "followed": [*SMALL, "index_source=exact", "workload.rate=100"],
    "far ahead": [*SMALL, "workload.rate=100"],
}


@pytest.mark.parametrize("words", MACRO)
@pytest.mark.parametrize("policy", POLICIES)
def test_macro_steps_change_nothing_whatever_goes_to_the_store(policy, words):
    name = ["colocated", "caching 3"][([*MACRO].index(words) + POLICIES.index(policy)) % 2]
    more = [*MACRO[words], "workload.max_output_tokens=40"]
    if policy == BACK:
        more.append(f"store.ahead_share={1 if words == 'far ahead' else 0.2}")
    results = [(cluster := system.cluster(), system.play(cluster)) for on in ("true", "false")
               for system in [with_policy(name, policy, *more, f"macro_steps={on}")]]  # fmt: skip
    reports = [{**result.report, "wall_s": None} for _, result in results]
    assert reports[0] == reports[1] and reports[0]["num_failed"] == 0 < reports[0]["store"]["received"]["tokens"]
    assert rows_of(results[0][1].timelines) == rows_of(results[1][1].timelines)
    held = [[(t.tobytes(), b.tolist()) for t, b in store_of(c).instance.pool.index.iter_prefixes()] for c, _ in results]
    assert held[0] == held[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["Ask", "Grant", "Done", "Inserted", "Refuse"])
@pytest.mark.parametrize("fault", ["drop", "repeat", "delay"])
def test_answers_survive_lost_repeated_and_late_messages(policy, kind, fault):
    cluster = with_policy("colocated", policy, *SMALL).cluster()
    rng = np.random.default_rng(0)
    cluster.faults = MessageFaults(rng, **{fault: 0.7}, delay_ns=100_000_000, kinds=[kind], limit=40)
    assert_answered(play(cluster))
    nothing_is_left(cluster)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_store_may_be_silent_for_longer_than_a_deadline_and_may_die(policy):
    for end_s in (0.3, 0.6, 0.9):
        cluster = with_policy("caching 3", policy, *SMALL, *SLOW).cluster()
        label = store_of(cluster).instance.label
        cluster.call_at(100_000_000, lambda cluster=cluster, label=label: cluster.stop(label))
        act = cluster.crash if end_s < 0.5 else cluster.resume
        cluster.call_at(int(end_s * 1e9), lambda act=act, label=label: act(label))
        assert_answered(play(cluster))
        nothing_is_left(cluster)


@pytest.mark.parametrize("policy", POLICIES)
def test_whoever_comes_goes_and_migrates_every_request_is_answered_right(policy):
    words = ["cluster.roles=[prefill,prefill,decode,decode,store]", "mode=pd_caching_3", policy, *KEEPS, *SMALL,
             "scaling=schedule", "scaling.changes=[]", "departure=migrate", "heir=least_load"]  # fmt: skip
    cluster = local(*words, *SLOW).cluster()
    assert_answered(play(cluster, at_random(1, 0.01)))
    nothing_is_left(cluster)
    assert cluster.members.counts()["left"] > 0


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("words", [[], ["kvcache.num_hbm_blocks=12", "workload.rate=1000"]], ids=["room", "preempted"])
def test_selective_kv_that_one_request_used_is_not_written(name, words):
    """Not if it was computed chunk by chunk, preempted, handed over, or given back."""
    own = ["workload.num_turns=1", "workload.num_sessions=24", "sched.chunk_size=16", *words]
    cluster = local(*PLACES[name], SELECTIVE, *KEEPS, *own).cluster()
    timelines = play(cluster)
    assert len(timelines) == 24 and all(t.succeeded for t in timelines)
    nothing_is_left(cluster)
    assert store_of(cluster).instance.pool.index.num_blocks == num_dropped(cluster) == 0
    if words and name == "colocated":
        assert sum(t.stats.num_preemptions for t in timelines) > 0


@pytest.mark.parametrize("name", PLACES)
def test_selective_of_prompts_with_a_common_beginning_that_alone_is_written(name):
    own = ["workload.num_turns=1", "workload.num_sessions=24", "workload.prefix_tokens=64", "workload.share_ratio=24",
           "workload.rate=3"]  # fmt: skip
    cluster = local(*PLACES[name], SELECTIVE, *KEEPS, *own).cluster()
    timelines = play(cluster)
    index = store_of(cluster).instance.pool.index
    assert all(t.succeeded for t in timelines) and [len(tokens) for tokens, _ in index.iter_prefixes()] == [64]
    store = cluster.members.labels.index(store_of(cluster).instance.label)
    sent = [counts for summary in cluster.summaries() if (counts := summary.sent.get(store)) is not None]
    assert sum(counts.tokens for counts in sent) <= 2 * 64, "from two at a time, at most"


def test_selective_min_hits_1_writes_what_write_through_does():
    kept = []
    for policy in (["store=write_through"], [SELECTIVE, "store.min_hits=1"]):
        cluster = local(*PLACES["caching 3"], *policy, "fetch=always", "+per_role.store.kvcache.num_dram_blocks=999"
                        ).cluster()  # fmt: skip
        play(cluster)
        kept.append(sorted(tokens.tobytes() for tokens, _ in store_of(cluster).instance.pool.index.iter_prefixes()))
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize("name", PLACES)
def test_write_back_nothing_is_written_while_there_is_room(name):
    cluster = with_policy(name, BACK).cluster()
    play(cluster)
    assert store_of(cluster).instance.pool.index.num_blocks == num_dropped(cluster) == 0


class Removed(NobodyFollows):
    """Paths that lost blocks at their ends, and how many."""

    def __init__(self):
        self.paths = []

    def removed(self, node, blocks):
        self.paths.append((np.frombuffer(node.path(), dtype=np.int32), len(blocks)))


@pytest.mark.parametrize("words", [[], TIERS], ids=["hbm", "tiers"])
def test_write_back_what_left_the_instances_is_in_the_store_or_counted(words):
    """The store has room for all."""
    big = ["fetch=always", "+per_role.store.kvcache.num_dram_blocks=999", "workload.num_sessions=16"]
    for share in (0.1, 0.5, 1):
        cluster = local(*PLACES["colocated"], BACK, *big, *SMALL, *words, f"store.ahead_share={share}").cluster()
        logs = []
        for node in cluster.nodes:
            if node.instance.role in SERVING:
                node.instance.pool.index.log = Removed()
                logs.append(node.instance.pool.index.log)
        assert all(t.succeeded for t in play(cluster))
        kept, num_missing = store_of(cluster).instance.pool.index, 0
        gone = [path for log in logs for path in log.paths]
        for tokens, num_blocks in gone:
            num_missing += max(0, min(len(tokens) - kept.peek(tokens).num_tokens, num_blocks * 16))
        assert gone and num_missing <= num_dropped(cluster) == num_lost(cluster)
        assert store_of(cluster).instance.pool.index.num_blocks > 0


def test_write_back_further_ahead_less_is_lost():
    lost = []
    for share in (0.05, 1):
        cluster = with_policy("colocated", BACK, *SMALL, *SLOW, f"store.ahead_share={share}").cluster()
        play(cluster)
        lost.append(num_dropped(cluster))
    assert lost[1] < lost[0]


def test_selective_a_prompt_that_stays_hot_is_offered_once_by_each_instance():
    own = ["workload.num_turns=1", "workload.num_sessions=24", "workload.prefix_tokens=64", "workload.share_ratio=24"]
    asked = {}

    def act(cluster, number):
        asked.update({ask.ticket: ask for ask in store_of(cluster).instance.handoffs.transfers.open_asks})

    play(with_policy("colocated", SELECTIVE, *own).cluster(), act)
    assert sorted(ticket[0] for ticket in asked) == [0, 2]


def test_what_comes_from_a_store_is_used_and_reported():
    for policy in POLICIES:
        system = with_policy("colocated", policy, *SMALL)
        cluster = system.cluster()
        result = system.play(cluster)
        store = result.report["store"]
        assert store["dropped_tokens"] == num_dropped(cluster) and store["received"]["tokens"] > 0
        assert (store["fetches"] > 0) == bool(from_store(cluster, list(cluster.scheduler.timelines.values())))
        assert policy != BACK or store["fetches"] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_model_answers_as_without_a_store(policy):
    words = ["model=tiny", "step_time=model", "workload.num_sessions=4"]
    alone = LocalCluster(load_config([*WORKLOAD, *words, "exec=emulated", "index=none"])).run_once()
    own = [*PLACES["caching 3"], policy, *KEEPS, "kvcache.num_hbm_blocks=24"]
    stored = LocalCluster(load_config([*WORKLOAD, *words, "exec=emulated", *own])).run_once()
    answers = [tokens_of(result.timelines) for result in (alone, stored)]
    assert answers[0] == answers[1] and stored.report["store"]["received"]["tokens"] > 0


class Unranked(RadixIndex):
    """An index that says neither how often a block was used nor what goes next."""

    ranks_blocks = False


REFUSED = {
    f"{SELECTIVE} store.min_hits=0": "store.min_hits=0: expected an integer >= 1",
    f"{SELECTIVE} store.min_hits=1.5": "store.min_hits=1.5: expected an integer",
    f"{SELECTIVE} store.max_waiting=0": "store.max_waiting=0: expected an integer >= 1",
    f"{SELECTIVE} +store.ahead_share=.1": "store.ahead_share=0.1: .* takes min_hits, max_waiting",
    f"{BACK} store.ahead_share=0": "store.ahead_share=0: expected a number above 0, up to 1",
    f"{BACK} store.ahead_share=1.01": "store.ahead_share=1.01: expected a number above 0, up to 1",
    f"{BACK} +store.min_hits=2": "store.min_hits=2: .* takes ahead_share",
    f"{BACK} fetch=never": "contradicts fetch=never",
    f"{BACK} ~index +index={{_target_:{__name__}.Unranked}}": "store=WriteBack contradicts index=Unranked",
    f"{SELECTIVE} ~index +index={{_target_:{__name__}.Unranked}}": "store=WriteThroughSelective contradicts index=Unr",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_policy_cannot_be_is_refused_by_name(words):
    with pytest.raises(ConfigError, match=REFUSED[words]):
        LocalCluster(load_config([*WORKLOAD, *PLACES["colocated"], *KEEPS, *words.split()]))


def test_write_through_goes_with_an_index_that_ranks_nothing():
    cluster = local(*PLACES["colocated"], "store=write_through", *KEEPS, "~index",
                    f"+index={{_target_: {__name__}.Unranked}}").cluster()  # fmt: skip
    assert_answered(play(cluster))
    assert store_of(cluster).instance.pool.index.num_blocks > 0
