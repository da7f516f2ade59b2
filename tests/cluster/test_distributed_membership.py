"""Ranks that become instances, leave and come back as others, in real processes: every request is answered right."""

import functools
import json
import signal
import time

import pytest
from cluster.forked_ranks import Forked
from cluster.playing import scheduled
from cluster.survival import START_S, found_by, have_started, wait_for

from memserve import LocalCluster, load_config
from memserve.cluster.roster import Roster
from memserve.cluster.turnover import Vacancies
from memserve.cluster.wiring import build_scaling
from memserve.config.errors import ConfigError
from memserve.request import Role

WORKLOAD = [
    "workload=synthetic", "workload.num_sessions=24", "workload.num_turns=3", "workload.prompt_tokens=60",
    "workload.turn_tokens=15", "workload.prefix_tokens=24", "workload.share_ratio=2", "workload.max_output_tokens=12",
    "workload.rate=10", "workload.think_time_s=0.1",
]  # fmt: skip
DISTRIBUTED = ["exec=distributed", "tokens=hash", "model.num_threads=1"]
LIMIT_S = 200
PD = ["cluster=1p1d", "mode=pd_caching_3", "index_source=exact", "policy=prompt_tree", "cluster.spares=1"]
COMES_AND_GOES = scheduled(
    {"at_s": 0.3, "add": "decode"}, {"at_s": 0.8, "drain": "decode-1"}, {"at_s": 1.2, "add": "prefill"},
    {"at_s": 1.7, "switch": "prefill-0", "to": "decode"},
)  # fmt: skip
CASES = {
    "gloo": [*PD, *COMES_AND_GOES, "transport=gloo", "granularity=by_layer", "repeats=2", "heir=least_load"],
    "mapped": [*PD, *COMES_AND_GOES, "transport=mapped", "granularity=by_request", "fetch=always",
               "heir=least_load", "departure=migrate"],
    "by load": ["cluster=colocated_1", "transport=gloo", "cluster.spares=2", "scaling=by_load", "policy=least_load",
                "scaling.full.colocated=0.1", "scaling.max_instances=3",  # any request that is seen is too many for one
                "scaling.interval_s=0.02", "scaling.window_s=1"],
}  # fmt: skip

LONG = ["workload.num_sessions=5", "workload.num_turns=1", "workload.max_output_tokens=2500", "workload.rate=50"]
MIGRATES = [*LONG, "cluster.roles=[prefill,decode,decode]", "mode=pd_caching_3", "transport=gloo", "departure=migrate",
            "policy@decode_policy=least_load", *scheduled({"at_s": 0.5, "drain": "decode-2"})]  # fmt: skip
REBALANCED = [
    *LONG,
    "cluster.roles=[prefill,decode,decode]",
    "mode=pd_caching_3",
    "transport=gloo",
    "decode_policy._target_=cluster.test_rebalancing.Unfair",
    "rebalancing=by_answers",
    "rebalancing.gap=1",
    "migration=live",
]

pytestmark = pytest.mark.timeout(240)


@functools.cache
def expected(*words):
    cluster = LocalCluster(load_config(["exec=simulated", *WORKLOAD, *words, "cluster=colocated_1", "index=none"]))
    return {t.request_id: t.token_ids.tolist() for t in cluster.run_once().timelines}


def test_whoever_comes_and_goes_every_request_is_answered_right(tmp_path):
    cases = [([*DISTRIBUTED, *WORKLOAD, *words], 4) for words in (*CASES.values(), MIGRATES, REBALANCED)]
    *found, migrated, rebalanced = found_by(tmp_path, cases, 4, LIMIT_S)
    answers_migrated(migrated)
    answers_rebalanced(rebalanced)
    for result in found:
        assert result["tokens"] == expected() and result["missing"] == {}
        report = result["report"]
        assert report["num_failed"] == report["quarantined_blocks"] == report["membership"]["lost"] == 0
        assert all(attempt == 0 for _, _, attempt in result["ends"].values())
    first, second, mapped, by_load = [result["report"] for result in found]
    for report in (first, second, mapped):
        counts = {key: report["membership"][key] for key in ("joined", "left", "switched")}
        assert counts == {"joined": 3, "left": 2, "switched": 1} and report["membership"]["bequeathed_tokens"] > 0
        ids = [row["id"] for row in report["instances"]]
        assert ids == ["prefill-0", "decode-1", "decode-2", "prefill-3", "decode-4"]
        assert all(row["num_requests"] for row in report["instances"][2:4])
    assert by_load["membership"]["joined"] >= 1


def answers_migrated(result):
    """They take seconds, and the instance that is to leave at half of one has left before the others end."""
    assert result["tokens"] == expected(*LONG) and result["missing"] == {}
    report = result["report"]
    assert report["num_failed"] == report["quarantined_blocks"] == report["membership"]["lost"] == 0
    assert all(attempt == 0 for _, _, attempt in result["ends"].values())
    assert report["membership"]["left"] == 1 and report["migrations"]["number"] > 0
    assert report["instances"][2]["id"] == "decode-2" and report["instances"][2]["left_s"] < report["makespan_s"]


def answers_rebalanced(result):
    """Of five, four were to be decoded at one instance and one at the other."""
    assert result["tokens"] == expected(*LONG) and result["missing"] == {}
    report = result["report"]
    assert report["num_failed"] == report["quarantined_blocks"] == 0 < report["migrations"]["number"]
    assert report["migrations"]["ahead_tokens"] > 0
    assert all(attempt == 0 for _, _, attempt in result["ends"].values())
    assert sum(row["num_generated"] for row in report["instances"]) == report["tokens"]["generated"]


def test_a_spare_takes_the_place_of_one_that_is_killed(tmp_path):
    """Another spare was killed before: nobody is made of it."""
    words = [*DISTRIBUTED, *WORKLOAD, *CASES["by load"], "scaling.full.colocated=1000"]
    ranks = Forked(tmp_path, [(words, 4)], 4)
    try:
        wait_for(lambda: have_started(tmp_path, [1]), START_S, "the cluster starts", ranks)
        ranks.signal(2, signal.SIGKILL)
        time.sleep(0.5)
        ranks.signal(1, signal.SIGKILL)
        wait_for(ranks.ended, LIMIT_S, "the run ends", ranks)
    finally:
        ranks.kill()
    assert ranks.codes() == [0, -signal.SIGKILL, -signal.SIGKILL, 0], ranks.printed()
    (result,) = json.loads((tmp_path / "found.json").read_text())
    assert result["missing"] == {"spare rank 2": "gone", "colocated-0": "gone"}
    counts = {key: result["report"]["membership"][key] for key in ("joined", "left", "lost")}
    assert counts == {"joined": 1, "left": 0, "lost": 1}
    answered = {name: tokens for name, tokens in result["tokens"].items() if result["ends"][name][0] == "length"}
    assert answered and all(tokens == expected()[name] for name, tokens in answered.items())
    assert {reason for reason, *_ in result["ends"].values()} <= {"length", "instance_lost"}
    (row,) = result["report"]["instances"]
    assert row["id"] == "colocated-1" and row["joined_s"] > 0


def refused(*words):
    cfg = load_config([*DISTRIBUTED, "transport=gloo", *words])
    build_scaling(cfg, [Role(role) for role in cfg.cluster.roles])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling=by_load"], "scaling.max_instances=8 contradicts cluster.spares=0: expected 1 at most, or 7 spares"),
        (["scaling=schedule", "scaling.changes=5"], "scaling.changes=5: expected a list of changes"),
        (["cluster.spares=1"], "cluster.spares=1 contradicts scaling=fixed"),
        (["cluster.spares=-1"], "cluster.spares=-1: expected an integer >= 0"),
        (scheduled({"at_s": 1, "crash": "colocated-0"}), "crash colocated-0 contradicts exec=distributed"),
        (["cluster.spares=1", "scaling=schedule", "cluster.tensor_parallel.colocated=2", "tokens=model", "model=tiny"],
         "scaling=Schedule contradicts cluster.tensor_parallel above 1"),
        (["cluster.spares=1", "exec=simulated", "transport=in_process"], "cluster.spares=1 contradicts exec=simulated"),
    ],
)  # fmt: skip
def test_what_processes_cannot_do_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        refused(*words)


def test_ranks_that_wait_become_who_is_wanted_first():
    vacancies = Vacancies()
    vacancies.want(5, due_ns=20, rank=None)
    vacancies.want(6, due_ns=10, rank=2)
    assert vacancies.filled(15) == []
    vacancies.ranks += [2, 3]
    assert vacancies.filled(15) == [(6, 2)] and vacancies.ranks == [3], "nobody else gets a rank that is promised"
    assert vacancies.filled(25) == [(5, 3)] and vacancies.filled(30) == []


def test_who_was_promised_a_rank_that_is_gone_takes_any():
    vacancies = Vacancies()
    vacancies.want(6, due_ns=10, rank=2)
    vacancies.ranks += [2, 3]
    vacancies.only({3})
    assert vacancies.filled(15) == [(6, 3)]


def test_a_rank_may_be_one_instance_after_another():
    roster = Roster([1, 2], num_spares=1)
    assert roster.world_size == 5 and roster.instance(4) is None and roster.part(4) == 0
    roster.assign(2, 4)
    assert (roster.instance(4), roster.leader(2), list(roster.ranks(2))) == (2, 4, [4])
    roster.release(0)
    roster.assign(3, 1)
    assert (roster.instance(1), roster.leader(3), roster.leader(0)) == (3, 1, 1)
    roster.assign(1, 9)
    assert list(roster.ranks(1)) == [2, 3], "what is known stays"
    assert len(roster.endpoints(77)) == 1, "one that nobody has heard of is one rank"


def test_a_spare_comes_for_who_is_silent_and_stays_beside_it_when_it_is_back(tmp_path):
    lasting = ["workload.rate=2", "workload.num_sessions=16"]
    words = [
        *DISTRIBUTED, *WORKLOAD, *lasting, "cluster=colocated_1", "cluster.spares=1", "cluster.silence_s=1",
        "cluster.patience_s=100", "scaling=by_load", "scaling.full.colocated=100", "scaling.max_instances=2",
        "transport=gloo",
    ]  # fmt: skip
    ranks = Forked(tmp_path, [[words, 3]], 3)
    log = tmp_path / "found.json.rank-0.log"
    try:
        wait_for(lambda: have_started(tmp_path, (1,)), START_S, "the cluster starts", ranks)
        ranks.signal(1, signal.SIGSTOP)
        wait_for(lambda: "colocated-1 has joined" in log.read_text(), 30, "somebody comes for it", ranks)
        ranks.signal(1, signal.SIGCONT)
        wait_for(lambda: "colocated-0 is back" in log.read_text(), 30, "it is heard again", ranks)
        wait_for(ranks.ended, LIMIT_S, "all end", ranks)
    finally:
        ranks.kill()
    assert ranks.codes() == [0] * 3, ranks.printed()
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == expected(*lasting) and found["missing"] == {}
    assert found["report"]["membership"]["joined"] == 1 and found["report"]["num_failed"] == 0
