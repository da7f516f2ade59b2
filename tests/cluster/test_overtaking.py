"""Words between instances and the global scheduler that take a while: in order on each way, overtaken by other ways'.

Every way from one process to another keeps its order, and nothing more: what a decode instance says may be heard before
the first token that its prefill instance sent earlier, and an abort may come after what takes its attempt's place.
"""

import itertools

import numpy as np
import pytest
from cluster.playing import play
from cluster.test_lost_instances import CLUSTERS, assert_right, expected, local, lost, nothing_is_left

from memserve.messages import Cancel
from memserve.request import FinishReason

SEEDS = range(5)
GRANULARITIES = ("by_layer", "by_request", "packed")


class LateWays:
    """Delays each message of a cluster's instances to the global scheduler, and back, by up to 20 ms.

    to_decode_ns: at most so much for what the global scheduler tells decode instances.
    """

    def __init__(self, cluster, seed, to_decode_ns=20_000_000):
        self._cluster, self._rng, self._to_decode_ns = cluster, np.random.default_rng(seed), to_decode_ns
        self._last_ns: dict[tuple[str, str], int] = {}
        self._deliver = cluster._deliver
        cluster._deliver = self._down
        for node in cluster.nodes:
            node.instance.drain_outbox = self._up(node, node.instance.drain_outbox)

    def _up(self, node, drain):
        def delayed():
            for message in drain():
                self._later((node.instance.label, "up"), node, self._cluster._to_scheduler, message)
            return []

        return delayed

    def _down(self, node, message):
        self._later((node.instance.label, "down"), node, self._deliver, node, message)

    def _later(self, way, node, call, *arguments):
        most_ns = self._to_decode_ns if way[0].startswith("decode") and way[1] == "down" else 20_000_000
        due_ns = self._cluster.now_ns + int(self._rng.integers(most_ns))
        due_ns = self._last_ns[way] = max(due_ns, self._last_ns.get(way, 0))
        self._cluster.call_at(due_ns, lambda: None if node.is_gone else call(*arguments))


def late(system, seed, **options):
    cluster = system.cluster()
    LateWays(cluster, seed, **options)
    return cluster


@pytest.mark.parametrize(
    ("name", "granularity"),
    [*itertools.product((name for name in CLUSTERS if not name.startswith("colocated")), GRANULARITIES),
     ("colocated_2", "by_request")],
)  # fmt: skip
def test_answers_are_right_whatever_is_heard_first(name, granularity):
    for seed in SEEDS:
        cluster = late(local(*CLUSTERS[name], f"granularity={granularity}"), seed)
        timelines = play(cluster)
        assert_right(timelines, ())
        assert all(timeline.succeeded and timeline.attempt == 0 for timeline in timelines)
        nothing_is_left(cluster)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-3"])
def test_an_instance_may_die_while_its_words_are_on_their_way(victim, granularity):
    system = local(*CLUSTERS["2p2d"], f"granularity={granularity}")
    for seed in SEEDS:
        cluster = late(system, seed)
        timelines = play(cluster, lost(10 + 23 * seed, [victim]))
        assert len(timelines) == len(expected())
        assert_right(timelines, ())
        nothing_is_left(cluster)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_an_abort_may_come_after_the_attempt_that_takes_the_place_of_what_it_aborts(granularity):
    words = ["transfer.deadline_s=30", "link.gb_per_s=1"]
    system = local(*CLUSTERS["2p1d"], *words, f"granularity={granularity}")
    for seed in SEEDS:
        cluster = late(system, seed, to_decode_ns=2_000_000_000)
        timelines = play(cluster, lost(10 + 7 * seed, ["prefill-0"]))
        assert_right(timelines, ())
        assert all(timeline.succeeded for timeline in timelines)
        nothing_is_left(cluster)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_an_attempt_that_was_given_up_may_arrive_after_its_successor(granularity):
    """Its instance was stopped, and taken for gone."""
    words = ["transfer.deadline_s=30", "link.gb_per_s=0.01"]
    system = local(*CLUSTERS["2p1d"], *words, f"granularity={granularity}")

    def stop_and_resume(cluster, number):
        if number == 10 + 5 * (seed // 6):
            cluster.stop("prefill-0")
            cluster.scheduler.instance_gone("prefill-0", cluster.now_ns)
            cluster._from_scheduler()
            cluster.call_at(cluster.now_ns + (20 + 10 * (seed % 6)) * 1_000_000, lambda: cluster.resume("prefill-0"))

    for seed in range(0, 48, 5):  # each moment, and each length of the pause
        cluster = late(system, seed, to_decode_ns=2_000_000_000)
        timelines = play(cluster, stop_and_resume)
        assert_right(timelines, ())
        assert all(timeline.succeeded for timeline in timelines)
        nothing_is_left(cluster)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize("victim", [None, "prefill-0", "decode-3"])
def test_a_cancelled_request_ends_once_and_is_never_tried_again(victim, granularity):
    system = local(*CLUSTERS["2p2d"], f"granularity={granularity}")
    for seed in SEEDS:
        moment, attempts = 10 + 23 * seed, {}

        def act(cluster, number, moment=moment, attempts=attempts):
            if number == moment:
                for request_id, timeline in list(cluster.scheduler.timelines.items()):
                    cluster._to_scheduler(Cancel(request_id))
                    attempts[request_id] = timeline.attempt
                if victim is not None:
                    cluster.crash(victim)

        cluster = late(system, seed)
        for timeline in play(cluster, act):
            assert timeline.reason is FinishReason.ABORTED or timeline.succeeded
            assert timeline.token_ids.tolist() == expected()[timeline.request_id][: timeline.num_output]
            assert timeline.attempt == attempts.get(timeline.request_id, timeline.attempt)
        nothing_is_left(cluster)
