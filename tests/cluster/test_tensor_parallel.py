"""Instances of several ranks: the answers of instances of one, whatever the sizes at both ends of a hand-off; what
becomes of an instance that loses a rank; and what is refused by name.
"""

import functools
import json
import re
import signal
import time

import pytest
import torch
from cluster.forked_ranks import Forked
from cluster.survival import LIMIT_S, START_S, check, found_by, have_started, wait_for
from cluster.test_distributed import WORKLOAD
from torch.distributed import HashStore

from memserve import LocalCluster, load_config
from memserve.cluster.engine import build_engine
from memserve.cluster.hosts import check_one_host, choose_device, hosts_of, neighbours
from memserve.cluster.launch import check_world
from memserve.cluster.roster import Roster
from memserve.config.errors import ConfigError

MODEL = ["model=tiny", "model.random.num_attention_heads=8", "model.random.num_key_value_heads=4"]
DISTRIBUTED = ["exec=distributed", "tokens=model", "model.num_threads=1", *MODEL]

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


def sizes(**by_role):
    return [f"cluster.tensor_parallel.{role}={size}" for role, size in by_role.items()]


CASES = [
    (["transport=gloo", "cluster=colocated_1", *sizes(colocated=2)], 3),
    (["transport=mapped", "cluster=1p1d", "mode=pd_caching_3", "granularity=by_layer", "sched.chunk_size=16",
      *sizes(decode=2)], 4),
    (["transport=gloo", "cluster=1p1d", "mode=pd_caching_3", "granularity=by_layer", "sched.chunk_size=16",
      *sizes(prefill=2)], 4),
    (["transport=gloo", "cluster=1p1d", "mode=pd_caching_3", "granularity=packed", "kvcache.num_hbm_blocks=16",
      "kvcache.num_dram_blocks=30", "preemption=swap", "sched.decode_headroom_blocks=1",
      *sizes(prefill=2, decode=2)], 5),
    (["transport=mapped", "cluster=1p1d", "mode=pd_caching_3", "granularity=by_request_agg", "layout=aggregated",
      "+per_role.decode.kvcache.num_hbm_blocks=300", *sizes(prefill=2, decode=4)], 7),
]  # fmt: skip


def expected(workload):
    return _expected(tuple(workload))


@functools.cache
def _expected(workload):
    alone = ["exec=emulated", "step_time=model", *MODEL, "cluster=colocated_1", "index=none"]
    timelines = LocalCluster(load_config([*alone, *workload])).run_once().timelines
    return {t.request_id: t.token_ids.tolist() for t in timelines}


def test_split_instances_answer_as_whole_ones_and_hand_over_both_ways_between_any_sizes(tmp_path):
    cases = [[[*DISTRIBUTED, *WORKLOAD, *words], ranks] for words, ranks in CASES]
    for (words, _), result in zip(CASES, found_by(tmp_path, cases, 7, LIMIT_S + START_S), strict=True):
        report = result["report"]
        assert result["tokens"] == expected(WORKLOAD), words
        assert report["num_failed"] == 0 and report["quarantined_blocks"] == 0
        for way in ("p_to_d", "d_to_p"):
            sent = report["transfers"][way]
            assert (sent["tokens"] > 0) == ("cluster=1p1d" in words) and sent["failed"] == 0, (words, way)


def test_an_instance_whose_follower_is_killed_is_gone_as_a_whole_and_its_requests_are_served_elsewhere(tmp_path):
    """Ranks: 1 and 2 are prefill-0, 3 and 4 prefill-1, 5 decode-2. Nobody above them ends all when one ends."""
    workload = [*WORKLOAD, "workload.num_sessions=10", "workload.rate=4", "workload.max_output_tokens=20"]
    words = [
        *DISTRIBUTED, *workload, "cluster.roles=[prefill,prefill,decode]", "mode=pd_caching_3", "transport=gloo",
        "granularity=by_layer", "policy=random", *sizes(prefill=2),
    ]  # fmt: skip
    ranks = Forked(tmp_path, [[words, 6]], 6)
    try:
        wait_for(lambda: have_started(tmp_path, (1, 3, 5)), START_S, "the cluster starts", ranks)
        time.sleep(0.5)
        ranks.signal(2, signal.SIGKILL)
        wait_for(ranks.ended, LIMIT_S, "all ranks end", ranks)
    finally:
        ranks.kill()
    assert ranks.codes() == [0, 1, -signal.SIGKILL, 0, 0, 0], ranks.printed()  # a leader left alone ends by itself
    (found,) = json.loads((tmp_path / "found.json").read_text())
    ends = check(found, expected(workload))
    assert ends.get("length", 0) + ends.get("stop", 0) > len(found["ends"]) / 2
    assert found["report"]["quarantined_blocks"] == 0


def test_ranks_are_given_to_instances_in_order_leader_first():
    roster = Roster([1, 2, 4])
    assert roster.world_size == 8
    assert [list(roster.ranks(i)) for i in range(3)] == [[1], [2, 3], [4, 5, 6, 7]]
    assert [roster.leader(i) for i in range(3)] == [1, 2, 4]
    assert [(roster.instance(rank), roster.part(rank)) for rank in (1, 3, 4, 7)] == [(0, 0), (1, 1), (2, 0), (2, 3)]


def test_a_world_that_does_not_fit_the_sizes_is_refused_by_both_numbers():
    words = ["exec=distributed", "cluster=1p2d", "mode=pd_basic", "transport=gloo", "model=tiny", *sizes(decode=2)]
    cfg = load_config(words)
    check_world(cfg, 6)
    with pytest.raises(ConfigError, match=r"4 ranks .* expected 6, .*\[1, 2, 2\].*--nproc-per-node 6"):
        check_world(cfg, 4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["exec=emulated", *sizes(colocated=2)], "cluster.tensor_parallel.colocated=2 contradicts exec=emulated"),
        (["exec=simulated", *sizes(colocated=2)], "cluster.tensor_parallel.colocated=2 contradicts geometry=own"),
        (["exec=simulated", *sizes(every=2)], "cluster.tensor_parallel.every=2 contradicts geometry=own"),
        (["exec=simulated", "geometry=llama3_8b", *sizes(every=2)],
         "cluster.tensor_parallel.every=2 contradicts tokens=hash"),
        (["exec=simulated", "tokens=workload", "geometry=llama3_8b", *sizes(every=16)],
         "cluster.tensor_parallel.every=16: expected a divisor of geometry.num_kv_heads=8"),
        (["exec=distributed", "transport=gloo", "tokens=hash", *sizes(colocated=2)], "contradicts tokens=hash"),
        (["exec=distributed", "transport=gloo", *sizes(decode=2)], "none is decode"),
        (["exec=distributed", "transport=gloo", *sizes(colocated=0)], "colocated=0: expected an integer >= 1"),
        (["exec=distributed", "transport=gloo", "cluster=1p1d", "mode=pd_basic", *sizes(prefill=2, decode=3)],
         "prefill=2 and decode=3: expected that one divides the other"),
    ],
)  # fmt: skip
def test_contradictions_are_named_before_anything_runs(words, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config(words)


@pytest.mark.parametrize("with_model", [True, False], ids=["an instance", "the router"])
def test_a_model_that_cannot_be_split_so_is_refused_by_name(with_model):
    words = ["exec=distributed", "model=tiny", "transport=gloo", *sizes(colocated=4)]
    named = "cluster.tensor_parallel.colocated: tensor parallelism of 4 ranks: the model's num_kv_heads=2"
    with pytest.raises(ConfigError, match=named):
        build_engine(load_config(words), with_model=with_model)


def test_mapped_over_two_hosts_is_refused_by_both_names():
    store = HashStore()
    for rank, host in enumerate(["anywhere", "host A", "host A", "host B"]):
        store.set(f"host/{rank}", host)
    hosts = hosts_of(store, 2, 4, "host A")
    assert neighbours(hosts, 2) == [1, 2] and neighbours(hosts, 3) == [3]
    with pytest.raises(ConfigError, match="rank 1 is on host 'host A', rank 3 on 'host B'.*or transport=gloo"):
        check_one_host(hosts)
    check_one_host(hosts_of(store, 3, 4, "host A"))


def test_ranks_of_a_host_take_its_gpus_in_turn_and_none_where_they_compute_on_its_cpu(monkeypatch):
    taken = []
    gpus = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append}
    for name, value in gpus.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for device in ("cpu", "cuda"):
        for rank in (1, 2, 3):
            choose_device(device, [1, 2, 3], rank)
    assert taken == [0, 1, 0]
