"""What a routing policy is shown of a running cluster: the clock, who decodes, how much is free by what was said."""

import numpy as np
import pytest

from memserve.cluster.local import LocalCluster
from memserve.compose import load_config
from memserve.sched.routing import Policy

BUSY = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=24", "workload.num_turns=2",
    "workload.prompt_tokens=60", "workload.turn_tokens=20", "workload.max_output_tokens=40", "workload.rate=60",
    "workload/lengths=uniform", "kvcache.num_hbm_blocks=60", "control.latency_s=0.002", "control.request_s=0.0003",
]  # fmt: skip
CLUSTERS = {
    "colocated": ["cluster.roles=[colocated,colocated,colocated]"],
    "caching 3": ["cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_3"],
}
SEEN = []  # (request, snapshot) pairs of the latest run


class MostFreeBlocks(Policy):
    """As in CONTRIBUTING.md, and keeps what it was shown."""

    def choose(self, request, cluster, rng):
        SEEN.append((request, cluster))
        num_waiting = cluster.num_requests - cluster.num_decoding
        return int((cluster.free_blocks - num_waiting * len(request.tokens) / 16).argmax())


def played(*words, prepare=lambda cluster: None):
    SEEN.clear()
    own = f"{__name__}.MostFreeBlocks"
    system = LocalCluster(load_config([*BUSY, f"policy._target_={own}", f"decode_policy._target_={own}", *words]))
    cluster = system.cluster()
    prepare(cluster)
    return system.play(cluster)


@pytest.mark.parametrize("name", CLUSTERS)
def test_macro_steps_change_nothing_of_what_a_policy_sees(name):
    shown, reports = [], []
    for on in ("true", "false"):
        result = played(*CLUSTERS[name], f"macro_steps={on}")
        reports.append({**result.report, "wall_s": None})
        columns = ("num_requests", "num_decoding", "num_gpus", "free_blocks", "num_blocks", "said_s")
        shown.append([(r.request_id, c.now_s, *(getattr(c, k).tolist() for k in columns)) for r, c in SEEN])
    assert shown[0] == shown[1] and reports[0] == reports[1] and reports[0]["num_failed"] == 0


def test_who_decodes_is_who_has_a_first_token_as_far_as_the_global_scheduler_has_heard():
    """Clients hear of a token, and of the end, 2 ms later."""
    result = played(*CLUSTERS["colocated"])
    spans = [(t.instance, int(t.token_times_ns[0]) - 2_000_000, t.finished_ns - 2_000_000) for t in result.timelines]
    for _, cluster in SEEN:
        now_ns = round(cluster.now_s * 1e9)
        there = [label for label, first_ns, end_ns in spans if first_ns <= now_ns < end_ns]
        assert cluster.num_decoding.tolist() == [there.count(label) for label in cluster.labels]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_policy_sees_the_clock_the_request_and_what_instances_said_before(name):
    result = played(*CLUSTERS[name])
    timelines = {t.request_id: t for t in result.timelines}
    for request, cluster in SEEN:
        timeline = timelines[request.request_id]
        assert request.arrival_s == timeline.arrival_ns / 1e9 and request.max_tokens == 40
        assert cluster.now_s == timeline.dispatched_ns / 1e9
        has_said = np.isfinite(cluster.free_blocks)
        assert (has_said == np.isfinite(cluster.said_s)).all() and (has_said == (cluster.num_blocks == 60)).all()
        assert (cluster.said_s + 0.002 <= cluster.now_s + 1e-9).all(), "it has come the way of a message"
        assert (cluster.free_blocks[has_said] <= 60).all() and (cluster.free_blocks >= 0).all()
        assert (cluster.num_decoding <= cluster.num_requests).all() and (cluster.num_decoding >= 0).all()
    assert max(cluster.num_decoding.max() for _, cluster in SEEN) > 0
    assert min(cluster.free_blocks.min() for _, cluster in SEEN) < 40


def test_instances_say_what_is_free_whenever_a_request_comes_or_goes():
    said = []

    def prepare(cluster):
        groups, (node,) = cluster.scheduler.groups, cluster.nodes
        heed = groups.has_room

        def note(label, room, said_ns):
            said.append((room.num_free, said_ns, node.instance.pool.num_available, node.instance.num_unfinished))
            heed(label, room, said_ns)

        groups.has_room = note

    free = ["control.latency_s=0", "control.request_s=0", "workload.num_sessions=3", "workload.rate=1"]
    result = played("cluster=colocated_1", *free, prepare=prepare)
    assert all(num_free == num_available for num_free, _, num_available, _ in said)
    came_or_went = {t.stats.queued_ns for t in result.timelines} | {t.finished_ns for t in result.timelines}
    assert {said_ns for _, said_ns, _, _ in said} == came_or_went
    assert said[-1][0] == 60 and said[-1][3] == 0


def test_ranks_of_an_instance_are_its_gpus():
    words = ["tokens=workload", "geometry=llama3_8b", "cluster.tensor_parallel.decode=4", "mode=pd_caching_1"]
    played(*words, "cluster.roles=[prefill,decode]", "workload.num_sessions=1")
    assert {len(c.labels) and (c.labels[0], int(c.num_gpus[0])) for _, c in SEEN} == {("prefill-0", 1), ("decode-1", 4)}


def test_who_is_named_anew_for_what_was_prefilled_has_it_among_those_that_decode():
    """Decode instances that refuse for want of room: the count never goes below 0, and ends at 0."""
    played(*CLUSTERS["caching 3"], "kvcache.num_hbm_blocks=30", "workload.max_output_tokens=80", "workload.rate=1000")
    last = {}
    for _, cluster in SEEN:
        assert (cluster.num_decoding <= cluster.num_requests).all() and (cluster.num_decoding >= 0).all()
        last[cluster.labels] = cluster
    assert len(last) == 2
