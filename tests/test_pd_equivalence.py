"""Whatever the mode, granularity, layout, block size, chunk or pressure: the answers of colocated instances.

On HashRunner a stale, lost, misplaced, early or foreign block changes the answer.
"""

import functools
import itertools
from dataclasses import replace

import pytest

from memserve import LocalCluster, load_config

MODES = ("pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3")
WORKLOAD = [
    "exec=simulated", "tokens=hash", "workload=synthetic", "workload.num_sessions=2", "workload.num_turns=3",
    "workload.prompt_tokens=50", "workload.turn_tokens=15", "workload.prefix_tokens=24", "workload.share_ratio=2",
    "workload.max_output_tokens=9", "workload.rate=200", "workload.think_time_s=0.05",
]  # fmt: skip
PRESSURE = {"roomy": 2048, "scarce": 150}  # tokens of a pool; a request needs up to 140


@functools.cache
def composed(words):
    return load_config([*WORKLOAD, *words])


def answers(words, **changes):
    """(tokens of every request, report). changes: options set without composing, which takes longer than a run."""
    cfg = composed(tuple(words))
    for name, value in changes.items():
        section, _, option = name.partition("__")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{option: value}) if option else value})
    cluster = LocalCluster(cfg)
    result = cluster.run_once()
    assert result.report["num_failed"] == 0 and result.report["quarantined_blocks"] == 0
    return {t.request_id: t.token_ids.tolist() for t in result.timelines}, result.report


@functools.cache
def expected(*words):
    return answers(["cluster=colocated_1", "index=none", *words])[0]


def pairs():
    for granularity, layout in itertools.product(
        ("by_layer", "by_request", "by_request_agg", "packed"), ("discrete", "aggregated")
    ):
        if (granularity, layout) != ("by_request_agg", "discrete"):
            yield granularity, layout


SIZES = list(itertools.product((1, 4, 16), (None, 16)))  # of blocks and chunks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("granularity", "layout"), list(pairs()))
def test_answers_are_the_same_in_the_full_product(mode, granularity, layout):
    """Of mode, granularity, layout and pressure; each with half of the sizes, its neighbours with the other half."""
    ways = composed(("mode=pd_basic", "cluster=1p1d", f"granularity={granularity}", f"layout={layout}"))
    first = (MODES.index(mode) + list(pairs()).index((granularity, layout))) % 2
    for (block_size, chunk), (name, capacity) in itertools.product(SIZES[first::2], PRESSURE.items()):
        got, _ = answers(
            [f"mode={mode}", "cluster=1p1d"],
            granularity=ways.granularity,
            layout=ways.layout,
            kvcache__block_size=block_size,
            kvcache__num_hbm_blocks=-(-capacity // block_size) + 2,
            sched__chunk_size=chunk,
            sched__decode_headroom_blocks=1,
        )
        assert got == expected(), (name, block_size, chunk)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cluster", "policy"),
    [("1p2d", "random"), ("1p2d", "session_affinity"), ("2p1d", "least_load"), ("3p1d", "round_robin")],
)
def test_answers_are_the_same_on_more_instances_under_every_policy(mode, cluster, policy):
    words = [f"mode={mode}", f"cluster={cluster}", f"policy={policy}", f"policy@decode_policy={policy}"]
    granularity = "by_layer" if policy in ("least_load", "random") else "packed"
    assert answers([*words, f"granularity={granularity}", "kvcache.num_hbm_blocks=40"])[0] == expected()


@pytest.mark.parametrize("async_swap", [False, True])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_decode_instance_that_preempts_computes_the_same(preemption, async_swap):
    words = ["mode=pd_caching_3", "cluster=2p1d", "kvcache.num_hbm_blocks=11", "sched.decode_headroom_blocks=0"]
    words += [f"preemption={preemption}", "kvcache.num_dram_blocks=20", f"kvcache.async_swap={async_swap}"]
    more = ["workload.num_sessions=3", "workload.max_output_tokens=12"]
    got, report = answers([*words, *more])
    assert got == expected(*more)
    assert report["preemptions"] > 0


@pytest.mark.parametrize("mode", ["pd_basic", "pd_caching_1"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_decode_instance_that_caches_nothing_keeps_nothing_of_what_it_preempts(mode, preemption):
    words = [f"mode={mode}", "cluster=1p1d", "kvcache.num_hbm_blocks=11", "sched.decode_headroom_blocks=0"]
    words += [f"preemption={preemption}", *(["kvcache.num_dram_blocks=9"] if preemption == "swap" else [])]
    more = ["workload.num_sessions=4", "workload.max_output_tokens=30", "workload.num_turns=1"]
    got, report = answers([*words, *more])
    assert got == expected(*more)
    decode = report["instances"][1]
    assert decode["preemptions"] > 0
    assert decode["num_indexed_blocks"] == decode["num_evicted_blocks"] == 0


def test_kv_handed_over_that_has_to_go_before_it_runs_is_a_preemption_and_no_swap():
    words = ["mode=pd_basic", "cluster=1p1d", "kvcache.block_size=1", "kvcache.num_hbm_blocks=200"]
    more = ["workload.num_sessions=12", "workload.max_output_tokens=40", "workload.num_turns=1", "workload.rate=20"]
    _, report = answers([*words, *more, "sched.decode_headroom_blocks=0"])
    decode = report["instances"][1]
    assert decode["tokens"]["computed_on_decode"] > 0 and decode["num_swaps_dropped"] == 0
    assert decode["preemptions"] * (50 + 24 + 40) >= decode["tokens"]["computed_on_decode"]
