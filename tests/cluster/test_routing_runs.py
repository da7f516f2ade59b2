"""Whole simulated runs: what routing by prefix is worth, what trees get wrong, and that nothing else changes."""

import pytest

from memserve import LocalCluster, load_config
from memserve.cluster.capacity import rank_geometry
from memserve.config.errors import ConfigError

SHARED = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=24", "workload.prefix_tokens=512",
    "workload.rate=20", "workload.share_ratio=8", "workload.prompt_tokens=32", "workload.turn_tokens=16",
    "workload.max_output_tokens=8",
]  # fmt: skip
PD = ["cluster=3p1d", "mode=pd_caching_3", "policy@decode_policy=least_kv"]
TIGHT = ["kvcache.num_hbm_blocks=80", "workload.num_turns=4", "cluster=colocated_4", "policy=prompt_tree"]


def report(*words):
    return LocalCluster(load_config([*SHARED, *words])).run()


@pytest.mark.parametrize("words", [PD, ["cluster=colocated_4"]], ids=["3p1d", "colocated"])
def test_where_sessions_share_prefixes_routing_by_prefix_beats_sessions_and_load(words):
    found = {p: report(*words, f"policy={p}") for p in ("prompt_tree", "cost_based", "session_affinity", "least_load")}
    best = max(found[p]["hit_ratio"] for p in ("prompt_tree", "cost_based"))
    assert best > max(found[p]["hit_ratio"] for p in ("session_affinity", "least_load"))
    soonest = min(found[p]["ttft_s"]["mean"] for p in ("prompt_tree", "cost_based"))
    assert soonest < min(found[p]["ttft_s"]["mean"] for p in ("session_affinity", "least_load"))
    assert all(r["num_failed"] == 0 and r["routing"]["skew_requests"] < 2.5 for r in found.values())


def test_a_prefill_instance_is_loaded_by_what_was_not_handed_over_and_not_by_what_decodes_elsewhere():
    words = ["cluster=2p1d", "mode=pd_basic", "policy=least_load", "workload.max_output_tokens=60"]
    timelines = LocalCluster(load_config([*SHARED, *words])).run_once().timelines
    most_decoding = 0
    for number, timeline in enumerate(timelines):
        now_ns, route = timeline.dispatched_ns, timeline.routes[0]
        before = timelines[:number]
        there = [t.instance for t in before if t.stats.received_ns > now_ns]
        assert route.num_requests.tolist() == [there.count(label) for label in route.labels]
        most_decoding = max(most_decoding, sum(t.finished_ns > now_ns for t in before) - len(there))
    assert most_decoding > 2


def test_an_exact_tree_is_wrong_less_often_than_one_that_never_forgets_when_pools_are_tight():
    exact, optimistic = (
        report(*TIGHT, *words)["routing"] for words in (["index_source=exact"], ["index_source.max_blocks=65536"])
    )
    assert optimistic["wrong_hit_tokens"] > 0 and exact["wrong_hit_tokens"] < optimistic["wrong_hit_tokens"]


def test_an_optimistic_tree_of_the_pools_size_is_wrong_less_often_than_a_larger_one():
    """By itself it is of the pool's size."""
    large, fitting = (report(*TIGHT, *words)["routing"] for words in (["index_source.max_blocks=65536"], []))
    assert fitting["wrong_hit_tokens"] < large["wrong_hit_tokens"]
    assert fitting["tree_evicted_blocks"] > 0 == large["tree_evicted_blocks"] and fitting["tree_blocks"] <= 4 * 80


IN_BYTES = ["kvcache.num_hbm_blocks=null", "geometry=llama3_8b", "kvcache.hbm_bytes=160MiB"]  # 80 blocks of 2 MiB


@pytest.mark.parametrize("words", [[], PD], ids=["colocated", "3p1d"])
def test_an_optimistic_tree_knows_how_many_blocks_a_pool_in_bytes_has(words):
    in_bytes, in_blocks = (report(*TIGHT, *words, *size, "tokens=workload") for size in (IN_BYTES, IN_BYTES[1:2]))
    assert in_bytes["routing"] == in_blocks["routing"] and in_bytes["routing"]["tree_evicted_blocks"] > 0


def test_it_knows_so_of_a_model_that_runs():
    words = ["exec=emulated", "step_time=model", "model=tiny", *TIGHT]
    cluster = LocalCluster(load_config([*SHARED, *words]))
    size = rank_geometry(cluster.cfg, cluster.engine.config, "colocated").block_bytes
    in_bytes = report(*words, "kvcache.num_hbm_blocks=null", f"kvcache.hbm_bytes={80 * size}")
    assert in_bytes["routing"] == cluster.run()["routing"] and in_bytes["routing"]["tree_evicted_blocks"] > 0


@pytest.mark.parametrize("source", ["optimistic", "exact"])
def test_without_pressure_no_tree_is_wrong(source):
    routing = report("cluster=colocated_4", "policy=prompt_tree", f"index_source={source}")["routing"]
    assert routing["num_promised"] > 0 and routing["wrong_hits"] == 0


@pytest.mark.parametrize("source", ["optimistic", "exact"])
def test_macro_steps_change_no_choice(source):
    reports = [
        report(*PD, "policy=prompt_tree", f"index_source={source}", f"macro_steps={m}") for m in ("true", "false")
    ]
    assert reports[0]["ttft_s"] == reports[1]["ttft_s"] and reports[0]["routing"] == reports[1]["routing"]


def test_an_exact_tree_hears_of_what_a_macro_step_evicts_when_it_does():
    """A second turn arrives while another session decodes, and takes the blocks of the first."""
    words = [
        "exec=simulated", "index_source=exact", "policy=prompt_tree", "workload=synthetic", "workload.num_sessions=6",
        "workload.num_turns=2", "workload.think_time_s=0.15", "workload.rate=5", "workload.prompt_tokens=16",
        "workload.turn_tokens=4", "workload.max_output_tokens=24", "kvcache.block_size=4", "kvcache.num_hbm_blocks=20",
    ]  # fmt: skip
    macro, single = (
        LocalCluster(load_config([*words, f"macro_steps={on}"])).run()["routing"] for on in ("true", "false")
    )
    assert macro == single and single["promised_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy=prompt_tree", "index_source=none"], "policy=PromptTree contradicts index_source=none"),
        (["policy=cost_based", "index=none"], "policy=CostBased contradicts index=none"),
        (["index_source.ttl_s=0"], "index_source.ttl_s=0"),
        (["index_source.max_blocks=0"], "index_source.max_blocks=0"),
        (["policy=prompt_tree", "policy.max_lead=0"], "policy.max_lead=0"),
        (["policy=balanced_prefix", "policy.rel_bound=0"], "policy.rel_bound=0"),
    ],
)
def test_contradictions_and_bounds_out_of_range_are_refused_before_anything_runs(words, message):
    with pytest.raises(ConfigError, match=message):
        LocalCluster(load_config(["exec=simulated", *words]))
