"""What an instance that leaves has cached goes to another: it is found there, and costs what a transfer costs."""

import numpy as np
import pytest
from cluster.playing import CLUSTERS, at_random, nothing_is_left, play, rows_of, scheduled
from cluster.test_membership import WORKLOAD, assert_answered, expected, local

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.request import Role
from memserve.sched.heirs import LeastLoadHeir
from memserve.sched.scaling import Add, ChangeRole, Crash, Drain, Load, Standing

ON_CALL = ["scaling=schedule", "scaling.changes=[]"]  # changes are the test's
HEIR = ["heir=least_load", "heir.share=1"]
CACHING = {name: words for name, words in CLUSTERS.items() if name != "basic"}
TURNS = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=12", "workload.num_turns=4", "workload.rate=4",
    "workload.prompt_tokens=200", "workload.think_time_s=2", "cluster=colocated_2",
]  # fmt: skip


def bequests(cluster):
    counted = [(s.num_bequeathed_tokens, s.num_bequests_declined) for s in cluster.summaries()]
    return np.array(counted).sum(axis=0)


@pytest.mark.parametrize("name", CACHING)
def test_whoever_comes_and_goes_every_request_is_answered_right_and_kv_is_left_to_others(name):
    system = local(*CACHING[name], "granularity=by_layer", *ON_CALL, *HEIR)
    num_given = 0
    for seed in range(2):
        cluster = system.cluster()
        assert_answered(play(cluster, at_random(seed, 0.05)))
        nothing_is_left(cluster)
        num_given += bequests(cluster)[0]
    assert num_given > 0


@pytest.mark.parametrize("name", CACHING)
def test_heirs_and_those_that_leave_may_crash_meanwhile(name):
    system = local(*CACHING[name], "granularity=by_request", *ON_CALL, *HEIR)
    num_given = num_lost = 0
    for seed in range(2):
        cluster = system.cluster()
        for timeline in play(cluster, at_random(seed, 0.1, crash=0.02)):
            if timeline.succeeded:
                assert timeline.token_ids.tolist() == expected()[timeline.request_id]
        nothing_is_left(cluster)
        num_given, num_lost = num_given + bequests(cluster)[0], num_lost + cluster.members.counts()["lost"]
    assert num_given > 0 < num_lost


def drained(*words):
    """The report of a run in which the first of two instances drains while its sessions think."""
    system = LocalCluster(load_config([*TURNS, *scheduled({"at_s": 5, "drain": "colocated-0"}), *words]))
    return system.run()


@pytest.mark.parametrize("source", ["optimistic", "exact"])
def test_what_was_left_is_found_by_the_sessions_that_had_it_there(source):
    words = ["policy=prompt_tree", f"index_source={source}"]
    lost, left = drained(*words), drained(*words, *HEIR)
    given = left["membership"]["bequeathed_tokens"]
    assert 0 == lost["membership"]["bequeathed_tokens"] < given == left["transfers"]["between"]["tokens"]
    assert left["tokens"]["cached_local"] - lost["tokens"]["cached_local"] == given
    assert left["membership"]["bequests_declined"] == left["num_failed"] == 0


def test_macro_steps_change_nothing_where_kv_is_left_to_others():
    changes = scheduled({"at_s": 1.3, "drain": "colocated-0"}, {"at_s": 1.3, "add": "colocated"})
    words = [*TURNS, "policy=prompt_tree", *changes, *HEIR, "workload.rate=50", "workload.max_output_tokens=100"]
    words += ["kvcache.num_hbm_blocks=150"]
    runs = [LocalCluster(load_config([*words, f"macro_steps={on}"])).cluster() for on in ("true", "false")]
    macro, single = [rows_of(play(cluster)) for cluster in runs]
    assert macro == single
    assert [m.ended_ns for m in runs[0].members.members] == [m.ended_ns for m in runs[1].members.members]
    assert tuple(bequests(runs[0])) == tuple(bequests(runs[1])) and bequests(runs[0])[0] > 0


def test_it_costs_what_the_link_takes_and_who_leaves_stays_until_it_has_left():
    slow = drained("policy=prompt_tree", *HEIR, "link.gb_per_s=0.0005")
    fast = drained("policy=prompt_tree", *HEIR)
    assert slow["transfers"]["between"]["seconds"] > 10 * fast["transfers"]["between"]["seconds"]
    assert slow["instances"][0]["left_s"] > fast["instances"][0]["left_s"] > 5


def test_an_heir_is_offered_a_share_of_a_pool_at_most_and_what_was_used_last_first():
    all_of_it = drained("policy=prompt_tree", *HEIR)["membership"]["bequeathed_tokens"]
    some = drained("policy=prompt_tree", "heir=least_load", "heir.share=0.02")["membership"]
    most = 0.02 * 2048 * 16
    assert most <= some["bequeathed_tokens"] < most + 512 < all_of_it and some["bequests_declined"] == 0


def test_an_heir_without_room_declines_and_is_asked_once_more_at_the_end():
    """The one request that runs at the heir holds nearly all of its blocks, and has ended by the end."""
    words = ["policy=round_robin", "workload.num_turns=1", "workload.rate=1000", "workload.max_output_tokens=700"]
    cluster = local(*TURNS, *words, *ON_CALL, *HEIR, "kvcache.num_hbm_blocks=64", "sched.max_running=1").cluster()
    declined = []
    cluster.call_at(6_900_000_000, lambda: cluster.change(Drain("colocated-0")))
    cluster.call_at(7_000_000_000, lambda: declined.append(bequests(cluster)[1]))
    assert all(t.succeeded for t in play(cluster))
    nothing_is_left(cluster)
    assert cluster.members.counts()["left"] == 1 and declined[0] > 0
    assert bequests(cluster)[0] > 0 == bequests(cluster)[1]


def test_an_instance_that_changes_its_role_leaves_what_it_has_to_one_that_stays():
    system = local(*CLUSTERS["caching 2"], *ON_CALL, *HEIR)
    cluster = system.cluster()
    cluster.call_at(60_000_000, lambda: cluster.change(ChangeRole("decode-3", Role.PREFILL)))
    assert_answered(play(cluster))
    nothing_is_left(cluster)
    (gone,) = [s for s in cluster.summaries() if s.stats.id == "decode-3"]
    given = {peer: counts.tokens for peer, counts in gone.sent.items() if peer == 2}
    assert given == {2: gone.num_bequeathed_tokens} and gone.num_bequeathed_tokens > 0


def test_a_stopped_heir_keeps_who_leaves_waiting_and_its_crash_makes_another_the_heir():
    system = local("cluster=colocated_2", "policy=least_load", *ON_CALL, *HEIR)
    cluster = system.cluster()

    def leave():
        cluster.stop("colocated-1")
        cluster.change(Drain("colocated-0"))

    cluster.call_at(100_000_000, leave)
    cluster.call_at(500_000_000, lambda: cluster.change(Add(Role.COLOCATED)))
    cluster.call_at(4_000_000_000, lambda: cluster.change(Crash("colocated-1")))
    assert_answered(play(cluster))
    nothing_is_left(cluster)
    (gone,) = [m for m in cluster.members.members if m.label == "colocated-0"]
    assert gone.ended_ns > 4_000_000_000 and bequests(cluster)[1] == 0, "and that one has it by now"


def test_the_heir_is_who_has_least_to_do():
    leaving = Load("colocated-0", Role.COLOCATED, Standing.DRAINING, 3)
    others = [Load(f"colocated-{i}", Role.COLOCATED, Standing.SERVING, n) for i, n in ((1, 4), (2, 1), (3, 1))]
    assert LeastLoadHeir().choose(leaving, others) == "colocated-2" and LeastLoadHeir().choose(leaving, []) is None


class NamesNobodyThere(LeastLoadHeir):
    def choose(self, leaving, others):
        return leaving.label


def test_an_heir_that_is_none_of_those_shown_is_refused_by_name():
    cluster = local("cluster=colocated_2", *ON_CALL, "heir._target_=cluster.test_bequest.NamesNobodyThere").cluster()
    with pytest.raises(ValueError, match="NamesNobodyThere chose 'colocated-0': expected None, or one of colocated-1"):
        cluster.change(Drain("colocated-0"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["heir=least_load"], "heir contradicts scaling=fixed: nobody leaves"),
        (["heir=least_load", *ON_CALL, "index=none"], "heir contradicts index=none: nobody has cached anything"),
        (["heir=least_load", *ON_CALL, "cluster=1p1d", "mode=pd_basic"], "heir contradicts mode=pd_basic"),
        (["heir=least_load", *ON_CALL, "heir.share=0"], "heir.share=0: expected a number above 0, up to 1"),
        (["heir=least_load", *ON_CALL, "heir.share=2"], "heir.share=2: expected a number above 0, up to 1"),
    ],
)
def test_what_cannot_be_left_to_anybody_is_refused_by_name(words, said):
    with pytest.raises(ValueError, match=said):
        LocalCluster(load_config([*WORKLOAD, *words]))


def test_refusals_are_config_errors():
    with pytest.raises(ConfigError):
        load_config([*WORKLOAD, "heir=least_load"])
