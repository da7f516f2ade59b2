"""Scaling policies alone: what they want of a cluster that they are told of."""

import pytest

from memserve.request import Role
from memserve.sched.load_scaling import ByLoad, SwitchRoles
from memserve.sched.scaling import Add, ChangeRole, Crash, Drain, Load, NoScaling, Schedule, Standing

P, D, C = Role.PREFILL, Role.DECODE, Role.COLOCATED
FULL = {"colocated": 10, "prefill": 4, "decode": 10}


def loads(*entries):
    return [
        Load(f"{role}-{number}", role, rest[0] if rest else Standing.SERVING, num_requests)
        for number, (role, num_requests, *rest) in enumerate(entries)
    ]


def asked(policy, *entries):
    """What it says to a cluster of which these are left."""
    policy.begin(sorted({role for role, *_ in entries}))
    return policy.changes(loads(*entries), 1)


def test_nobody_comes_and_goes_by_default():
    assert NoScaling().next_time_ns(None) is None and NoScaling().changes(loads((C, 99)), 0) == []


def test_a_schedule_is_kept_in_order_of_time_and_is_over_then():
    schedule = Schedule([
        {"at_s": 2, "switch": "decode-1", "to": "prefill"}, {"at_s": 1, "add": "decode"},
        {"at_s": 2, "crash": "decode-2"}, {"at_s": 0, "drain": "prefill-0"},
    ])  # fmt: skip
    asked, times, changes = None, [], []
    while (due := schedule.next_time_ns(asked)) is not None:
        times.append(due)
        changes += schedule.changes([], due)
        asked = due
    assert times == [0, 10**9, 2 * 10**9]
    assert changes == [Drain("prefill-0"), Add(D), ChangeRole("decode-1", P), Crash("decode-2")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("add", "expected a list of changes"),
        ([{"at_s": 1}], "changes.0.={'at_s': 1}: expected at_s, and one of add, drain, crash, or switch with to"),
        ([{"at_s": 1, "add": "decode", "drain": "decode-0"}], "expected at_s, and one of"),
        ([{"add": "decode"}], "changes.0..at_s=None: expected seconds"),
        ([{"at_s": -1, "add": "decode"}], "changes.0..at_s=-1: expected seconds"),
        ([{"at_s": 1, "add": "decoder"}], "changes.0..add='decoder': expected one of colocated, prefill, decode"),
        ([{"at_s": 1, "switch": "decode-0", "to": 3}], "changes.0..to='3': expected one of"),
        ([{"at_s": 1, "drain": 7}], "changes.0..drain=7: expected the label of an instance"),
        ([7], "changes.0.=7: expected at_s"),
    ],
)
def test_a_change_that_is_none_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Schedule(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            [{"at_s": 1, "drain": "decode-7"}],
            "drain decode-7: expected an instance that is there then, of prefill-0, decode-1, decode-2",
        ),
        ([{"at_s": 1, "drain": "prefill-0"}], "expected another prefill instance that stays"),
        ([{"at_s": 1, "drain": "decode-1"}, {"at_s": 2, "drain": "decode-2"}], "another decode instance that stays"),
        ([{"at_s": 1, "crash": "decode-1"}, {"at_s": 2, "drain": "decode-1"}], "an instance that is there then"),
        ([{"at_s": 1, "add": "colocated"}], "add colocated: expected a role of the cluster's, decode, prefill"),
        ([{"at_s": 1, "switch": "decode-2", "to": "colocated"}], "expected a role of the cluster's"),
    ],
)
def test_a_schedule_that_the_cluster_cannot_keep_is_refused_before_it_runs(changes, said):
    with pytest.raises(ValueError, match=said):
        Schedule(changes).begin([P, D, D])


def test_a_schedule_may_name_whoever_came_by_it():
    Schedule([
        {"at_s": 1, "add": "decode"}, {"at_s": 2, "drain": "decode-3"},
        {"at_s": 3, "switch": "decode-1", "to": "prefill"}, {"at_s": 4, "drain": "prefill-0"},
        {"at_s": 5, "crash": "prefill-4"},
    ]).begin([P, D, D])  # fmt: skip


def test_by_load_adds_as_many_as_the_requests_fill_and_no_more_than_allowed():
    policy = ByLoad(FULL, max_instances=6)
    assert asked(policy, (C, 10)) == []
    assert asked(policy, (C, 11)) == [Add(C)]
    assert asked(policy, (C, 35)) == [Add(C)] * 3
    assert asked(policy, (C, 99)) == [Add(C)] * 5
    assert asked(policy, (C, 30), (C, 0, Standing.STARTING)) == [Add(C)]
    assert asked(policy, (P, 5), (D, 25)) == [Add(D)] * 2 + [Add(P)]


def test_by_load_drains_the_emptiest_when_the_others_have_room_for_all():
    policy = ByLoad(FULL, max_instances=6, slack=0.7, window_s=0)
    assert asked(policy, (C, 4), (C, 2)) == [Drain("colocated-1")]
    assert asked(policy, (C, 4), (C, 3)) == [], "7 of 10 are no less than .7"
    assert asked(policy, (C, 0), (C, 0)) == [Drain("colocated-1")], "of equals the last one"
    assert asked(policy, (C, 0)) == [], "one stays"
    assert asked(policy, (C, 1), (C, 1), (C, 1, Standing.DRAINING)) == [], "one after the other"


def test_an_instance_is_spared_only_when_it_was_not_needed_for_the_whole_window():
    policy = ByLoad(FULL, max_instances=6, window_s=10)
    policy.begin([C, C])
    quiet, busy = loads((C, 1), (C, 1)), loads((C, 9), (C, 9))
    said = [policy.changes(quiet if second != 8 else busy, second * 10**9) for second in range(1, 21)]
    assert said[:18] == [[]] * 18, "not in the first ten seconds, nor in those after the eighth"
    assert said[18] == [Drain("colocated-1")]


def test_who_is_lost_is_replaced():
    policy = ByLoad(FULL, max_instances=6)
    policy.begin([P, D])
    assert policy.changes(loads((P, 0)), 0) == [Add(D)]
    policy = SwitchRoles(FULL, window_s=0)
    policy.begin([P, D])
    assert policy.changes(loads((P, 1), (P, 1)), 1) == [ChangeRole("prefill-1", D)]


def test_a_lost_role_comes_before_what_others_would_like():
    policy = ByLoad({"prefill": 1, "decode": 1}, max_instances=3)
    policy.begin([P, D])
    assert policy.changes(loads((D, 9)), 1) == [Add(P), Add(D)]


def test_switch_roles_takes_from_those_who_can_spare_one_where_others_are_full():
    policy = SwitchRoles({"prefill": 4, "decode": 10}, window_s=0)
    assert asked(policy, (P, 5), (D, 3), (D, 2)) == [ChangeRole("decode-2", P)]
    assert asked(policy, (P, 4), (D, 3), (D, 2)) == [], "4 are no more than full"
    assert asked(policy, (P, 5), (D, 4), (D, 4)) == [], "one could not do both their work"
    assert asked(policy, (P, 5), (D, 3)) == [], "one stays"
    assert asked(policy, (P, 1), (P, 0), (D, 11)) == [ChangeRole("prefill-1", D)]
    assert asked(policy, (P, 5), (D, 3), (D, 2, Standing.DRAINING)) == [], "one after the other"


def test_who_is_silent_neither_changes_its_role_nor_keeps_others_from_it():
    policy = SwitchRoles({"prefill": 4, "decode": 10}, window_s=0)
    assert asked(policy, (P, 5), (D, 3), (D, 2), (D, 0, Standing.SILENT)) == [ChangeRole("decode-2", P)]
    assert asked(policy, (P, 5), (D, 3), (D, 0, Standing.SILENT)) == [], "one stays"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ByLoad({"decoder": 1}, 4), "scaling.full=.*expected a number of requests for each of"),
        (lambda: ByLoad({"decode": 0}, 4), "scaling.full.decode=0: expected a number >= 1e-06"),
        (lambda: ByLoad(FULL, 0), "scaling.max_instances=0: expected an integer in .1, 16383."),
        (lambda: ByLoad(FULL, 4, slack=2), "scaling.slack=2: expected a number in"),
        (lambda: ByLoad(FULL, 4, interval_s=0), "scaling.interval_s=0: expected seconds in .0.001, "),
        (lambda: ByLoad(FULL, 4, window_s=-1), "scaling.window_s=-1: expected seconds"),
        (lambda: ByLoad(FULL, 4, startup_s=-1), "scaling.startup_s=-1: expected seconds"),
        (lambda: ByLoad(FULL, 1).begin([C, C]), "scaling.max_instances=1: expected at least the 2"),
        (
            lambda: ByLoad({"decode": 1}, 4).begin([P, D]),
            "scaling.full={'decode': 1.0}: expected a number of requests for prefill too",
        ),
        (lambda: SwitchRoles({"prefill": 1}).begin([C]), "expected two roles"),
    ],
)
def test_values_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
