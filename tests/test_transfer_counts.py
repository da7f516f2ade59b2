"""Transfers and network calls are the paper's numbers (section 5.2, Fig. 5), in a run's report."""

import pytest

from memserve import LocalCluster, load_config
from memserve.hash_runner import hash_geometry

NUM_LAYERS = hash_geometry(16).num_layers
WORDS = [
    "exec=simulated", "cluster=1p1d", "mode=pd_basic", "workload=synthetic", "workload.num_sessions=5",
    "workload.num_turns=1", "workload.prompt_tokens=70", "workload.max_output_tokens=4", "kvcache.block_size=16",
]  # fmt: skip
RETURNING = [*WORDS, "mode=pd_caching_3"]
NUM_REQUESTS, NUM_BLOCKS = 5, 5  # of 70 tokens


def sent(*words):
    report = LocalCluster(load_config([*WORDS, *words])).run()
    assert report["num_failed"] == 0
    return report["transfers"]["p_to_d"]


@pytest.mark.parametrize(
    ("granularity", "layout", "transfers", "calls"),
    [
        ("by_layer", "discrete", 2 * NUM_LAYERS, 2 * NUM_LAYERS * NUM_BLOCKS),
        ("by_layer", "aggregated", 2 * NUM_LAYERS, 2 * NUM_LAYERS * NUM_BLOCKS),
        ("by_request", "discrete", 1, 2 * NUM_LAYERS * NUM_BLOCKS),
        ("by_request", "aggregated", 1, 2 * NUM_LAYERS * NUM_BLOCKS),
        ("by_request_agg", "aggregated", 1, NUM_BLOCKS),
        ("packed", "discrete", 1, 1),
        ("packed", "aggregated", 1, 1),
    ],
)
def test_transfers_a_request_and_network_calls_a_block(granularity, layout, transfers, calls):
    counts = sent(f"granularity={granularity}", f"layout={layout}")
    assert (counts["transfers"], counts["calls"]) == (transfers * NUM_REQUESTS, calls * NUM_REQUESTS)
    assert counts["tokens"] == 70 * NUM_REQUESTS
    assert counts["bytes"] == NUM_REQUESTS * NUM_BLOCKS * hash_geometry(16).block_bytes


@pytest.mark.parametrize(
    ("granularity", "layout", "calls"),
    [
        ("by_layer", "discrete", 2 * NUM_LAYERS),
        ("by_layer", "aggregated", NUM_LAYERS * NUM_BLOCKS),
        ("by_request", "discrete", 2 * NUM_LAYERS),
        ("by_request", "aggregated", 1),
        ("by_request_agg", "aggregated", 1),
        ("packed", "discrete", 1),
    ],
)
def test_merged_neighbours_at_both_ends_go_in_one_call(granularity, layout, calls):
    """Blocks of one request in empty pools: in the layout where a layer's are neighbours, all of that layer's."""
    counts = sent(f"granularity={granularity}", f"layout={layout}", "granularity.merge=true", "workload.rate=0.001")
    assert counts["calls"] == calls * NUM_REQUESTS
    assert counts["bytes"] == NUM_REQUESTS * NUM_BLOCKS * hash_geometry(16).block_bytes


@pytest.mark.parametrize(("granularity", "calls"), [("by_request", 2 * 32 * NUM_BLOCKS), ("packed", 1)])
def test_a_simulated_model_s_kv_has_the_bytes_and_calls_of_its_geometry(granularity, calls):
    words = ["tokens=workload", "geometry=llama3_8b", f"granularity={granularity}", "link=ethernet_10g"]
    report = LocalCluster(load_config([*WORDS, *words, "workload.rate=0.001"])).run()
    counts = report["transfers"]["p_to_d"]
    token_bytes = 2 * 32 * 8 * 128 * 2
    assert counts["bytes"] == NUM_REQUESTS * NUM_BLOCKS * 16 * token_bytes and counts["calls"] == calls * NUM_REQUESTS
    link = load_config([*WORDS, *words]).link
    lasting_s = calls * link["latency_s"] + NUM_BLOCKS * 16 * token_bytes / (link["gb_per_s"] * 1e9)
    waited_s = report["phases_s"]["transfer"]["mean"] - lasting_s
    assert 0 < waited_s < 5 * link["message_latency_s"]


@pytest.mark.parametrize(
    ("granularity", "layout", "calls"),
    [("by_layer", "discrete", 64), ("by_request", "aggregated", 64), ("by_request_agg", "aggregated", 1)],
)
def test_with_a_geometry_hashes_move_as_that_model_s_kv_and_the_answers_stay(granularity, layout, calls):
    words = [*WORDS, "mode=pd_caching_3", "workload.num_turns=2", "geometry=llama3_8b", "link=ethernet_10g"]
    chosen = [f"granularity={granularity}", f"layout={layout}"]
    moved, stayed = (
        LocalCluster(load_config([*words, *other])).run_once()
        for other in (chosen, ["cluster=colocated_1", "mode=colocated"])
    )
    answers = [{t.request_id: t.token_ids.tolist() for t in result.timelines} for result in (moved, stayed)]
    assert answers[0] == answers[1]
    counts, block_bytes = moved.report["transfers"]["p_to_d"], 16 * 2 * 32 * 8 * 128 * 2
    assert counts["bytes"] == counts["calls"] // calls * block_bytes
    assert counts["bytes"] / 1.25e9 < moved.report["phases_s"]["transfer"]["mean"] * moved.report["num_requests"]


def test_a_geometry_that_hashes_cannot_stand_for_is_refused():
    words = ["geometry=llama3_8b", "geometry.num_kv_heads=1", "geometry.head_dim=3"]
    with pytest.raises(ValueError, match="6 bytes of keys a token and layer contradicts tokens=hash: expected a multi"):
        LocalCluster(load_config([*WORDS, *words]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "32 bytes in 2 layers, which is HashRunner's own and no model's"),
        (["geometry=llama2_13b"], "819,200 bytes in 40 layers, by geometry"),
        (["cluster=colocated_1", "mode=colocated"], ""),
    ],
)
def test_a_simulation_says_how_many_bytes_a_token_s_kv_is_when_it_moves(words, said):
    assert LocalCluster(load_config([*WORDS, *words])).moved.startswith(said)


def test_bytes_and_calls_are_those_of_all_ranks():
    """Each of them makes its calls, for its half of the bytes, at the same time as the other."""
    words = ["tokens=workload", "geometry=llama2_13b", "workload.rate=0.001"]
    whole, split = (sent(*words, f"cluster.tensor_parallel.every={ranks}") for ranks in (1, 2))
    assert split["bytes"] == whole["bytes"] == NUM_REQUESTS * NUM_BLOCKS * 16 * 819_200
    assert split["calls"] == 2 * whole["calls"] == 2 * NUM_REQUESTS * NUM_BLOCKS * 2 * 40


def test_by_layer_transfers_each_chunk():
    """Chunks of 32, 32 and 6 tokens: 2L transfers each; a block is still sent once."""
    counts = sent("granularity=by_layer", "sched.chunk_size=32")
    assert counts["transfers"] == 3 * 2 * NUM_LAYERS * NUM_REQUESTS
    assert counts["calls"] == 2 * NUM_LAYERS * NUM_BLOCKS * NUM_REQUESTS


def test_by_layer_the_first_layers_of_all_requests_in_a_step_leave_before_the_last_of_any():
    """Two prompts in one step, a layer of one on the link for 5 ms: only their last layers are left at its end."""
    words = ["granularity=by_layer", "link.latency_s=0.0005", "link.gb_per_s=1000", "workload.num_sessions=2"]
    step = ["workload/arrivals=closed_loop", "workload.rate=null", "cost_model.step_s=0.1"]
    result = LocalCluster(load_config([*WORDS, *words, *step])).run_once()
    ended_s, *others = {t.stats.prefill_end_ns / 1e9 for t in result.timelines}
    sent_s = max(span.end_s for span in result.activity if span.to)
    assert not others and sent_s - ended_s == pytest.approx(2 * 2 * NUM_BLOCKS * 0.0005, abs=1e-6)


def test_an_answer_of_one_token_is_handed_to_nobody_and_waits_for_no_grant_by_layer():
    """Beside another prompt that is computed in chunks."""
    words = ["workload.max_output_tokens=1", "workload.rate=100", "sched.chunk_size=16"]
    by_layer, by_request = (
        LocalCluster(load_config([*WORDS, *words, f"granularity={g}"])).run() for g in ("by_layer", "by_request")
    )
    assert by_layer["ttft_s"] == by_request["ttft_s"] and by_layer["transfers"] == by_request["transfers"]


@pytest.mark.parametrize("granularity", ["by_layer", "by_request", "packed"])
def test_bytes_of_transfers_that_fail_are_counted_as_in_vain(granularity):
    """On a link that cannot carry all prompts within the deadline; aggregated or not, a token's bytes are the same."""
    words = ["workload.num_sessions=60", "workload.rate=1000", "workload.prompt_tokens=64", "link.gb_per_s=0.0002",
             "transfer.deadline_s=0.05", f"granularity={granularity}"]  # fmt: skip
    counts = LocalCluster(load_config([*WORDS, *words])).run()["transfers"]["p_to_d"]
    assert counts["failed"] > 0 and counts["tokens"] > 0
    token_bytes = hash_geometry(16).block_bytes // 16
    assert counts["bytes"] - counts["bytes_in_vain"] == counts["tokens"] * token_bytes
    assert 0 < counts["bytes_in_vain"] < counts["bytes"]
    assert sent(f"granularity={granularity}")["bytes_in_vain"] == 0


def test_a_contended_link_takes_longer_for_the_same_bytes():
    words = ["cluster=3p1d", "granularity=by_request", "workload.rate=100000", "link.gb_per_s=0.00001"]
    reports = [
        LocalCluster(load_config([*WORDS, *words, f"link.contention={contention}"])).run()
        for contention in ("false", "true")
    ]
    apart, shared = (report["transfers"]["p_to_d"] for report in reports)
    assert apart["bytes"] == shared["bytes"] and apart["calls"] == shared["calls"]
    waits = [report["phases_s"]["transfer"]["mean"] for report in reports]
    assert waits[1] > 1.2 * waits[0]


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_by_default_no_more_gets_into_an_instance_than_its_link_carries(granularity):
    words = ["cluster=3p1d", "workload.num_sessions=40", "workload.prompt_tokens=700", "workload.rate=1000",
             "tokens=workload", "geometry=llama3_8b", "link=ethernet_10g", "link.latency_s=0",
             f"granularity={granularity}"]  # fmt: skip
    shared, apart = (
        LocalCluster(load_config([*WORDS, *words, *other])).run() for other in ([], ["link.contention=false"])
    )
    wire_s = shared["transfers"]["p_to_d"]["bytes"] / 1.25e9
    assert apart["makespan_s"] < wire_s < shared["makespan_s"]


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_macro_steps_change_nothing_where_moves_share_ports(granularity):
    words = ["cluster=3p1d", "mode=pd_caching_3", "workload.num_turns=3", "workload.think_time_s=0.01",
             "workload.rate=50", "workload.max_output_tokens=40", f"granularity={granularity}"]  # fmt: skip
    slow = ["link.gb_per_s=0.00002", "link.latency_s=0.0003"]
    on, off = (
        LocalCluster(load_config([*WORDS, *words, *slow, f"macro_steps={word}"])).run_once() for word in ("on", "off")
    )
    assert on.report["transfers"] == off.report["transfers"] and on.report["jct_s"] == off.report["jct_s"]


def returns(*words):
    several = ["workload.num_sessions=2", "workload.num_turns=3", "workload.max_output_tokens=40"]
    report = LocalCluster(load_config([*RETURNING, *several, *words])).run()
    assert report["num_failed"] == 0
    return report["transfers"]["d_to_p"]


def test_a_return_that_the_next_turn_overtakes_is_counted_and_one_with_time_is_not():
    slow = ["link.gb_per_s=0.00001"]
    assert returns(*slow, "workload.think_time_s=0")["overtaken"] > 0
    assert returns(*slow, "workload.think_time_s=60")["overtaken"] == 0


def test_a_prefill_instance_without_room_declines_returns_and_they_are_counted():
    counts = returns("workload.think_time_s=1", "kvcache.num_hbm_blocks=20", "workload.num_sessions=12",
                     "workload.rate=1000", "sched.decode_headroom_blocks=0")  # fmt: skip
    assert counts["declined"] > 0 and counts["failed"] == 0
