"""What methods of a user's own classes return is checked where they are asked: a forgotten `return`, a string, seconds
for nanoseconds. Nothing is taken for something else; the message names the class, the method and the value.
"""

import re

import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.sched.departures import Departure
from memserve.sched.fetch_policy import FetchPolicy
from memserve.sched.migration import MigrationPolicy
from memserve.sched.queue_policy import QueuePolicy
from memserve.sched.routing import Policy
from memserve.values import given_bool, given_int, given_key, given_number

SMALL = ["exec=simulated", "workload=synthetic", "workload.num_sessions=8", "workload.num_turns=2", "workload.rate=200"]
TWO = ["cluster=colocated_2", "workload.prefix_tokens=256", "workload.share_ratio=8"]
DRAINS = [*TWO, "scaling=schedule", "scaling.changes=[{at_s: 0.03, drain: colocated-1}]"]

VALUES = {
    "none": None, "text": "no", "number": 1, "half": 0.5, "negative": -1, "no_number": float("nan"), "key": (1.0, None),
    "yes": np.True_, "int": np.int64(3), "float": np.float32(0.5),
}  # fmt: skip


class Returns:
    """what: the name of a value that each method of it returns."""

    def __init__(self, what: str) -> None:
        self.value = VALUES[what]


class OwnPolicy(Returns, Policy):
    def choose(self, request, cluster, rng):
        return cluster.num_routed % len(cluster.labels)

    def work(self, num_cached, num_new):
        return self.value


class OwnQueue(Returns, QueuePolicy):
    def key(self, request, num_cached):
        return self.value


class OwnLevels(OwnQueue):
    def key(self, request, num_cached):
        return request.arrival_ns

    def level(self, request):
        return self.value


class OwnFetch(Returns, FetchPolicy):
    def fetches(self, fetch_s, compute_s):
        return self.value


class OwnDeparture(Returns, Departure):
    def moves(self, answer):
        return self.value


class OwnMigration(Returns, MigrationPolicy):
    def copies_ahead(self, num_left, num_before):
        return self.value


PLACES = {
    OwnPolicy: ("policy", TWO),
    OwnQueue: ("queue", []),
    OwnLevels: ("queue", []),
    OwnFetch: ("fetch", [*TWO, "policy=round_robin"]),
    OwnDeparture: ("departure", DRAINS),
    OwnMigration: ("migration", [*DRAINS, "departure=migrate"]),
}


def run(kind, what, *more):
    group, words = PLACES[kind]
    own = [f"~{group}", f"+{group}={{_target_: {__name__}.{kind.__name__}, what: {what}}}"]
    return LocalCluster(load_config([*SMALL, *words, *more, *own])).run()


NO_BOOL = "expected True or False"


@pytest.mark.parametrize(
    ("kind", "what", "said"),
    [
        (OwnPolicy, "half", "OwnPolicy.work gave 0.5: expected an integer >= 0, in the policy's own unit"),
        (OwnPolicy, "float", "OwnPolicy.work gave np.float32(0.5): expected an integer >= 0"),
        (OwnPolicy, "none", "OwnPolicy.work gave None: expected an integer >= 0"),
        (OwnPolicy, "negative", "OwnPolicy.work gave -1: expected an integer >= 0"),
        (OwnQueue, "none", "OwnQueue.key gave None of 'synthetic-00000/0': expected a number"),
        (OwnQueue, "text", "OwnQueue.key gave 'no' of 'synthetic-00000/0': expected a number"),
        (OwnQueue, "no_number", "OwnQueue.key gave nan of 'synthetic-00000/0': expected a number"),
        (OwnLevels, "none", "OwnLevels.level gave None of 'synthetic-00000/0': expected a number"),
        (OwnFetch, "none", f"OwnFetch.fetches gave None: {NO_BOOL}"),
        (OwnFetch, "text", f"OwnFetch.fetches gave 'no': {NO_BOOL}"),
        (OwnDeparture, "none", f"OwnDeparture.moves gave None: {NO_BOOL}"),
        (OwnDeparture, "number", f"OwnDeparture.moves gave 1: {NO_BOOL}"),
        (OwnMigration, "none", f"OwnMigration.copies_ahead gave None: {NO_BOOL}"),
        (OwnMigration, "text", f"OwnMigration.copies_ahead gave 'no': {NO_BOOL}"),
    ],
)
def test_what_a_method_is_not_to_return_is_refused_by_its_class_its_name_and_the_value(kind, what, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(kind, what)


@pytest.mark.parametrize(
    ("kind", "what"),
    [(OwnPolicy, "int"), (OwnQueue, "int"), (OwnQueue, "float"), (OwnFetch, "yes"), (OwnDeparture, "yes")],
)
def test_numpys_integers_numbers_and_booleans_are_taken_as_pythons(kind, what):
    assert run(kind, what)["num_finished"] == 16


@pytest.mark.parametrize("value", [True, 0, -2.5, 10**400, float("inf"), np.float64(1), np.int32(1), np.bool_(True)])
def test_what_has_a_place_among_numbers_comes_back_as_it_is(value):
    assert given_number(None, "key", value) is value and given_key(None, "key", (value,)) == (value,)


@pytest.mark.parametrize("value", [None, "1", 1j, float("nan"), np.float64("nan"), np.ones(2), np.ones(1), (1,), [1]])
def test_what_has_none_is_refused(value):
    with pytest.raises(ValueError, match=r"^str\.key gave .* of 'r': expected a number$"):
        given_number("owner", "key", value, "'r'")
    for key in ((1, value), value if not isinstance(value, tuple) else [1]):
        with pytest.raises(ValueError, match=r"^str\.key gave .*: expected a tuple of numbers$"):
            given_key("owner", "key", key)


def test_integers_and_booleans_come_back_as_pythons_or_are_refused():
    assert type(given_int("owner", "work", np.uint8(3), 0, 3)) is int
    assert given_bool("owner", "moves", np.False_) is False
    for value in (True, None, 1.0, "1", -1, 4, np.int64(4)):
        with pytest.raises(ValueError, match=r"^str\.work gave .*: expected an integer in \[0, 3\], of those$"):
            given_int("owner", "work", value, 0, 3, unit="of those")
    for value in (0, 1, None, "", "no", np.ones(1, dtype=bool)):
        with pytest.raises(ValueError, match=r"^str\.moves gave .*: expected True or False$"):
            given_bool("owner", "moves", value)
