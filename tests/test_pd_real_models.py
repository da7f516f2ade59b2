"""Real models, disaggregated: the answers of one colocated instance without caching, and the same KV at both ends."""

import functools

import numpy as np
import pytest
import torch
from weights_once import weights_loaded_once

from memserve import LocalCluster, load_config
from memserve.cluster import local

COMMON = ["exec=emulated", "step_time=model", "model.num_threads=1", "workload=synthetic"]
SYNTHETIC = ["workload.num_sessions=3", "workload.num_turns=2", "workload.prompt_tokens=40", "workload.turn_tokens=15",
             "workload.max_output_tokens=8", "workload.think_time_s=1"]  # fmt: skip
MODES = ("pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3")
PAIRS = [("by_layer", "discrete"), ("by_request", "discrete"), ("by_request_agg", "aggregated"), ("packed", "discrete")]
NAMED = {  # combinations that differ from each other in everything
    "caching 3 by layer, chunks": ["mode=pd_caching_3", "granularity=by_layer", "sched.chunk_size=16"],
    "caching 2 packed, 2 decode": ["mode=pd_caching_2", "cluster=1p2d", "granularity=packed", "layout=aggregated"],
    "caching 1 small blocks": ["mode=pd_caching_1", "granularity=by_request", "kvcache.block_size=4"],
    "basic, little room": ["mode=pd_basic", "granularity=by_request_agg", "layout=aggregated",
                           "kvcache.num_hbm_blocks=14", "sched.decode_headroom_blocks=1"],
    "caching 3 swaps": ["mode=pd_caching_3", "cluster=2p1d", "granularity=by_request", "kvcache.num_hbm_blocks=14",
                        "kvcache.num_dram_blocks=40", "preemption=swap", "sched.decode_headroom_blocks=1"],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_llama():
    """Every cluster with the same model has the same Llama object; pools and schedulers are its own."""
    with weights_loaded_once(local):
        yield


def play(*words):
    """(all tokens of every request, the cluster when everything has ended)"""
    cluster = LocalCluster(load_config([*COMMON, *words])).cluster()
    while cluster.advance():
        pass
    for node in cluster.nodes:
        node.instance.check()
    timelines = cluster.scheduler.timelines
    assert all(timeline.succeeded for timeline in timelines.values())
    return {name: timeline.token_ids.tolist() for name, timeline in timelines.items()}, cluster


def disaggregated(words):
    return words if any(word.startswith("cluster=") for word in words) else ["cluster=1p1d", *words]


@functools.cache
def expected(*model):
    return play("index=none", *SYNTHETIC, *model)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("granularity", "layout"), PAIRS)
def test_a_random_model_answers_the_same_in_every_mode_and_granularity(mode, granularity, layout):
    words = ["cluster=1p1d", f"mode={mode}", f"granularity={granularity}", f"layout={layout}"]
    assert play(*SYNTHETIC, "model=tiny", *words)[0] == expected("model=tiny")


@pytest.mark.parametrize("name", NAMED)
def test_a_random_model_answers_the_same_in_named_combinations(name):
    assert play(*SYNTHETIC, "model=tiny", *disaggregated(NAMED[name]))[0] == expected("model=tiny")


@pytest.mark.parametrize("name", NAMED)
def test_stories260k_answers_the_same_in_named_combinations(name, stories260k):
    model = f"model.path={stories260k}"
    assert play(*SYNTHETIC, model, *disaggregated(NAMED[name]))[0] == expected(model)


@pytest.mark.parametrize("name", ["caching 3 by layer, chunks", "caching 2 packed, 2 decode"])
def test_the_demo_s_model_answers_the_same_in_named_combinations(name, smollm2_path):
    model = (f"model.path={smollm2_path}", "workload.num_sessions=2")
    assert play(*SYNTHETIC, *model, *disaggregated(NAMED[name]))[0] == expected(*model)


def kv_of(instance, tokens):
    """[L, 2, n, B, K, D]: what an instance has cached of a prompt."""
    blocks = instance.pool.match(tokens).blocks
    return instance._runner._kv[:, :, torch.from_numpy(np.array(blocks, dtype=np.int64))]


@pytest.mark.parametrize(("granularity", "layout"), PAIRS)
def test_kv_that_was_sent_is_the_same_bits_at_both_ends_and_close_to_what_is_computed(granularity, layout):
    """After PD-Caching-3 both instances have whole conversations, a part computed here and a part there."""
    words = ["cluster=1p1d", "mode=pd_caching_3", f"granularity={granularity}", f"layout={layout}"]
    _, pair = play(*SYNTHETIC, "model=tiny", "sched.chunk_size=16", *words)
    _, alone = play(*SYNTHETIC, "model=tiny")
    prefill, decode = (node.instance for node in pair.nodes)
    num_compared = 0
    for tokens, _ in list(decode.pool.index.iter_prefixes()):
        there, here = kv_of(decode, tokens), kv_of(prefill, tokens)
        num_blocks = min(there.shape[2], here.shape[2])
        assert torch.equal(there[:, :, :num_blocks], here[:, :, :num_blocks])
        computed = kv_of(alone.nodes[0].instance, tokens)
        assert computed.shape == there.shape
        torch.testing.assert_close(there, computed, rtol=0, atol=1e-4)
        num_compared += num_blocks
    assert num_compared >= 12
    assert pair.nodes[1].instance.handoffs.transfers.counts.tokens > 0, "something came back"


def test_by_layer_in_measured_time_each_layer_leaves_when_it_is_written():
    """The first layer's transfer begins before the step ends that computes the last one."""
    words = ["cluster=1p1d", "mode=pd_basic", "granularity=by_layer", "step_time=measured", "workload.num_sessions=1"]
    cluster = LocalCluster(load_config([*COMMON, *SYNTHETIC, "model=tiny", *words])).cluster()
    ready_ns, ends_ns = [], []
    post = cluster.transport.post
    cluster.transport.post = lambda move_id, move, at_ns: (ready_ns.append(at_ns), post(move_id, move, at_ns))
    commit = cluster.nodes[0].instance.commit
    cluster.nodes[0].instance.commit = lambda batch, output, times_ns: (
        ends_ns.append(int(times_ns[-1])),
        commit(batch, output, times_ns),
    )
    while cluster.advance():
        pass
    assert all(t.succeeded for t in cluster.scheduler.timelines.values())
    num_layers = 3 * len(ends_ns)
    assert len(ready_ns) == num_layers and ready_ns == sorted(ready_ns)
    assert all(first < end for first, end in zip(ready_ns[::3], ends_ns, strict=True))
