"""By layer, room is asked for as a prompt's first chunk is computed, and nothing waits for the grant but what moves."""

import json

import pytest
from cluster.test_disaggregated import local, nothing_is_left, play

from memserve import LocalCluster, load_config

FULL = [  # of the decode instance's blocks a few prompts take all; the prefill instances have room
    "cluster=2p1d", "mode=pd_caching_3", "link=unlimited", "workload.num_sessions=30", "workload.num_turns=1",
    "workload.rate=10000", "workload.prompt_tokens=90", "workload.max_output_tokens=40", "sched.token_budget=64",
    "sched.decode_headroom_blocks=2", "+per_role.decode.kvcache.num_hbm_blocks=40",
]  # fmt: skip


def played(granularity, *words):
    return local(*FULL, f"granularity={granularity}", *words).run()


@pytest.mark.parametrize("words", [[], ["sched.chunk_size=16"]], ids=["whole", "chunks"])
def test_by_layer_room_is_asked_for_no_more_than_a_step_s_tokens_ahead(words):
    """Between two steps no more prompts are begun and not computed than a step has tokens for."""
    cluster, seen = local(*FULL, "granularity=by_layer", *words).cluster(), []

    def look(cluster):
        for node in cluster.nodes[:2]:
            if node.step is None:
                asked = node.instance.handoffs.requests
                assert all(node.instance.served[r.request_id].first_scheduled_ns is not None for r in asked)
                seen.append((len(asked), sum(r.num_computed < r.num_prompt for r in asked)))

    play(cluster, look)
    most_asked, most_ahead = (max(counts) for counts in zip(*seen, strict=True))
    assert most_asked > 8 and most_ahead <= (4 if words else 1)
    nothing_is_left(cluster)


def test_by_layer_first_tokens_wait_for_no_room_where_the_answer_goes_on():
    by_layer, by_request = played("by_layer"), played("by_request")
    assert by_layer["ttft_s"] == by_request["ttft_s"]
    assert by_layer["phases_s"]["grant_wait"]["mean"] > by_layer["ttft_s"]["mean"]


def test_by_layer_a_full_decode_instance_is_used_nearly_as_well_as_by_request():
    """Its room is reserved from the first chunk on; a prompt that waits for it is computed by the time it comes."""
    by_layer, by_request = played("by_layer"), played("by_request")
    assert by_layer["makespan_s"] < 1.1 * by_request["makespan_s"]
    assert by_layer["jct_s"]["mean"] < 1.1 * by_request["jct_s"]["mean"]


def test_by_layer_a_full_decode_instance_keeps_nobody_from_another():
    """Requests of two decode instances take turns at one prefill instance, and one of the two is full for good."""
    words = [
        "cluster=1p2d",
        "policy@decode_policy=round_robin",
        "kvcache.num_hbm_blocks=60",
        "workload.num_sessions=12",
    ]
    cluster = local(*[word for word in FULL if "per_role" not in word], "granularity=by_layer", *words).cluster()
    full = cluster.nodes[1].instance.pool
    holder = ("request", "whoever fills it", 0)
    blocks = full.alloc(58, holder)
    while cluster.advance() and len(answered := [t for t in cluster.scheduler.timelines.values() if t.succeeded]) < 6:
        pass
    assert {t.stats.decode_instance for t in answered} == {"decode-2"}
    full.release(blocks, holder)
    timelines = play(cluster)
    assert all(timeline.succeeded for timeline in timelines)
    nothing_is_left(cluster)


def test_by_layer_the_report_is_the_same_with_macro_steps_and_without():
    with_them, without = played("by_layer"), played("by_layer", "macro_steps=false")
    for report in (with_them, without):
        del report["wall_s"]
    assert with_them == without


LAYERS = [  # of a large model: prompts of up to 19,000 tokens share the way into one decode instance
    "+experiment=h100_llama3_8b", "cluster=2p1d", "mode=pd_basic", "granularity=by_layer", "workload=trace",
]  # fmt: skip
ARRIVALS = [
    [(400, 7500), (600, 1000), (600, 9500), (600, 16000), (800, 7500), (800, 7500), (1000, 7000), (1000, 7500)],
    [(0, 5500), (0, 14500), (400, 16000), (400, 19000), (600, 1500), (800, 13000), (1000, 1000), (1000, 16500)],
]  # ms, tokens


def cluster_of(arrivals, path):
    lines = [
        {"timestamp": time_ms, "input_length": length, "output_length": 50,
         "hash_ids": [99 * n + i for i in range(-(-length // 512))]}
        for n, (time_ms, length) in enumerate(arrivals)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return LocalCluster(load_config([*LAYERS, f"workload.path={path}"])).cluster()


class Wires:
    """Loses nothing; says when each message was sent."""

    def __init__(self, message_ns):
        self.message_ns, self.sent_ns = message_ns, {}

    def times_ns(self, kind, due_ns):
        self.sent_ns.setdefault(kind, []).append(due_ns - self.message_ns)
        return [due_ns]


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_transfer_ends_for_its_sender_when_its_last_move_does(arrivals, tmp_path):
    """However often its end has moved, since others came to share the way, or had left it."""
    cluster = cluster_of(arrivals, tmp_path / "trace.jsonl")
    cluster.faults = Wires(cluster.transport.link.message_ns)
    arrived_ns = [timeline.stats.arrived_ns for timeline in play(cluster)]
    assert sorted(cluster.faults.sent_ns["Done"]) == sorted(arrived_ns) and len(set(arrived_ns)) == 8


def test_nobody_is_looked_at_for_each_layer_of_a_prompt(tmp_path):
    """32 moves of each chunk, of which the last one of a prompt ends its ticket."""
    cluster = cluster_of(ARRIVALS[1], tmp_path / "trace.jsonl")
    looks, poll = [], cluster.nodes[0].instance.poll

    def look(now_ns):
        looks.append(now_ns)
        poll(now_ns)

    cluster.nodes[0].instance.poll = look
    play(cluster)
    num_moves = cluster.nodes[0].instance.handoffs.transfers.counts.transfers // 2
    assert num_moves >= 32 * 6 and len(looks) < num_moves / 2  # those at each step and message among them
