"""Where the time of a hand-off goes: what the link takes, what waits for a step's end, and what waits for room."""

from dataclasses import astuple

import pytest

from memserve import LocalCluster, load_config
from memserve.metrics.formulas import measure

STEP_S = 0.01
WORDS = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=12", "workload.num_turns=2", "workload.rate=50",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=30", "cluster=1p1d",
    "mode=pd_caching_3", f"cost_model.step_s={STEP_S}",
]  # fmt: skip
UNLIMITED = "link=unlimited"


def phases_of(*words):
    """Of every request that was handed over; each adds up to its JCT."""
    result = LocalCluster(load_config([*WORDS, *words])).run_once()
    assert result.report["num_failed"] == 0
    metrics = [measure(timeline) for timeline in result.timelines]
    for request in metrics:
        assert sum(phase or 0.0 for phase in astuple(request.phases)) == pytest.approx(request.jct, abs=1e-9)
    return [request.phases for request in metrics if request.phases.transfer is not None]


@pytest.mark.parametrize("granularity", ["by_layer", "by_request", "packed"])
def test_where_the_link_takes_no_time_a_transfer_takes_none_and_steps_are_waited_for(granularity):
    """Nobody lacks room; the decode instance, which is always in a step, reads twice between two of them: that it is
    asked for room, by layer during the prefill, and that the KV has come.
    """
    phases = phases_of(UNLIMITED, f"granularity={granularity}")
    assert phases and {(p.grant_wait, p.transfer) for p in phases} == {(0.0, 0.0)}
    assert (max(p.ask_wait for p in phases) > STEP_S / 4) == (granularity != "by_layer")
    assert max(p.decode_queue for p in phases) > STEP_S / 4


@pytest.mark.parametrize("granularity", ["by_request", "packed"])
def test_a_transfer_ends_with_its_last_byte_not_with_the_step_under_way_then(granularity):
    """Two requests at a time: one may have to wait for what the other sends, and then not for whole calls."""
    words = ["link.latency_s=0.001", "link.message_latency_s=0", "link.gb_per_s=1000", f"granularity={granularity}"]
    two = ["workload/arrivals=closed_loop", "workload.rate=null", "workload.arrivals.concurrency=2"]
    calls = [p.transfer / 0.001 for p in phases_of(*words, *two)]
    assert sum(n == pytest.approx(round(n), abs=1e-3) for n in calls) > 0.7 * len(calls), "whole calls, nothing else"


def test_a_decode_instance_without_room_is_backpressure_and_one_in_a_step_is_not():
    words = ["kvcache.num_hbm_blocks=14", "mode=pd_basic", "sched.decode_headroom_blocks=2", "workload.num_turns=1"]
    full, empty = phases_of(UNLIMITED, *words, "cluster=3p1d"), phases_of(UNLIMITED, "mode=pd_basic", "cluster=3p1d")
    assert sum(p.grant_wait for p in full) > 10 * STEP_S and sum(p.grant_wait for p in empty) == 0
    assert sum(p.ask_wait for p in empty) > 0


def test_by_layer_a_prompt_is_computed_while_its_grant_is_waited_for():
    words = ["workload.num_sessions=2", "workload.num_turns=1", "workload/arrivals=closed_loop", "workload.rate=null",
             "workload.arrivals.concurrency=1", "link.message_latency_s=0.003"]  # fmt: skip
    for granularity, asks_s in (("by_layer", 0.0), ("by_request", 0.003)):
        phases = phases_of(*words, f"granularity={granularity}")
        assert {(round(p.queue, 9), round(p.ask_wait, 9)) for p in phases} == {(0.0, asks_s)}


def test_by_layer_no_layer_is_written_before_what_was_swapped_for_its_step_is_there():
    words = ["exec=simulated", "cluster=1p1d", "mode=pd_caching_3", "granularity=by_layer", "workload=synthetic"]
    small = ["kvcache.num_hbm_blocks=48", "kvcache.num_dram_blocks=400", "cost_model.swap_block_s=0.02"]
    turns = ["workload.num_turns=3", "workload.num_sessions=12", "workload.rate=2", "workload.prompt_tokens=200"]
    cluster, seen = LocalCluster(load_config([*words, *small, *turns])).cluster(), {}
    while cluster.advance():
        step = cluster.nodes[0].step
        if step is not None and step.batch.num_swapped_blocks:
            seen[step.start_ns] = (step.batch.num_swapped_blocks, step.layers_ns[0] - step.start_ns)
    assert len(seen) > 5
    assert all(first_ns > num_swapped * 0.02e9 for num_swapped, first_ns in seen.values())
