"""What methods of a user's own classes return is checked where they are asked: a forgotten `return`, a string, seconds
for nanoseconds. Nothing is taken for something else; the message names the class, the method and the value.
"""

import itertools
import re
from typing import ClassVar

import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.kvcache.eviction import Eviction
from memserve.kvcache.index import Match
from memserve.kvcache.radix import RadixIndex
from memserve.request import Phase
from memserve.sampling_params import SamplingParams
from memserve.sched.batching import Batching
from memserve.sched.cost_model.base import CostModel
from memserve.sched.departures import Departure
from memserve.sched.fetch_policy import FetchPolicy
from memserve.sched.migration import MigrationPolicy
from memserve.sched.prediction import Prediction
from memserve.sched.preemption import Preemption
from memserve.sched.queue_policy import FCFS, QueuePolicy
from memserve.sched.rebalancing import Rebalancing
from memserve.sched.routing import Policy
from memserve.sched.store_policy import StorePolicy
from memserve.sched.swap_policy import SwapPolicy
from memserve.values import given_bool, given_int, given_key, given_number
from memserve.workload.session import Session, Turn, Workload

SMALL = ["exec=simulated", "workload=synthetic", "workload.num_sessions=8", "workload.num_turns=2", "workload.rate=200"]
TWO = ["cluster=colocated_2", "workload.prefix_tokens=256", "workload.share_ratio=8"]
DRAINS = [*TWO, "scaling=schedule", "scaling.changes=[{at_s: 0.03, drain: colocated-1}]"]

VALUES = {
    "none": None, "text": "no", "number": 1, "half": 0.5, "negative": -1, "no_number": float("nan"), "key": (1.0, None),
    "infinite": float("inf"), "yes": np.True_, "int": np.int64(3), "float": np.float32(0.5),
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


class OwnEviction(Returns, Eviction):
    def key(self, node):
        return self.value


class ByEnd(Returns, Eviction):
    def key(self, node):
        return (node.num_tokens_end,)


class Alike(Returns, Eviction):
    def key(self, node):
        return ()


class OwnSwap(Returns, SwapPolicy):
    def num_to_use(self, blocks, num_hbm_blocks, num_tokens):
        return self.value


class OwnStore(Returns, StorePolicy):
    def num_offered(self, uses):
        return len(uses) + 1 if self.value == 1 else self.value


class OwnPlace(OwnStore):
    def num_offered(self, uses):
        return len(uses)

    def place(self, tokens, offered_to, stores):
        return self.value


class OwnLimit(OwnPlace):
    @property
    def max_incoming(self):
        return self.value


class OwnShare(OwnStore):
    def num_offered(self, uses):
        return 0

    def num_ahead(self, num_blocks):
        return self.value


class OwnRebalancing(Returns, Rebalancing):
    def target(self, source, cluster):
        return 1 - source

    def key(self, answer):
        return self.value


class OwnPrediction(Returns, Prediction):
    def costs(self, exact):
        return self.value


class OwnBatching(Returns, Batching):
    def first(self, running):
        return [self.value] if self.value == 1 else self.value

    def otherwise(self, running):
        return []


class Otherwise(OwnBatching):
    def first(self, running):
        return []

    def otherwise(self, running):
        return self.value


class OwnVictim(Returns, FCFS):
    def victim(self, running):
        return self.value


class OwnFigures(Returns, Workload):
    def sessions(self, tokenizer, seed):
        self.figures = {"mine": self.value}
        return [Session("a", 0, (Turn(np.arange(9, dtype=np.int32), SamplingParams()),), np.empty(0, dtype=np.int32))]


class OneCosts(Returns, CostModel):
    swap_block_s = 0.0

    def _one_s(self, num_cached, num_new):
        return self.value

    def _column_s(self, num_cached, num_new):
        return np.full(len(num_new), 0.001)

    def step_time_s(self, num_cached, num_new, num_more):
        return np.full(len(num_more), 0.001)


class ColumnCosts(OneCosts):
    def _one_s(self, num_cached, num_new):
        return 0.001

    def _column_s(self, num_cached, num_new):
        return np.full(len(num_new), self.value)


class StepCosts(ColumnCosts):
    def _column_s(self, num_cached, num_new):
        return np.full(len(num_new), 0.001)

    def step_time_s(self, num_cached, num_new, num_more):
        return np.full(len(num_more), self.value)


class NamesAnother(OwnBatching):
    """Serves a request of another instance, too, if one runs there."""

    seen: ClassVar[list] = []

    def first(self, running):
        self.seen.extend(running)
        return list(running)

    def otherwise(self, running):
        others = (r for r in self.seen if r.phase is Phase.RUNNING and all(r is not mine for mine in running))
        return list(itertools.islice(others, 1))


class KeepsBlocks(Returns, Preemption):
    def preempt(self, request, pool):
        pass


class LosesBlocks(Returns, Preemption):
    def preempt(self, request, pool):
        request.block_table.truncate(0)


class NoMatch(RadixIndex):
    def __init__(self, block_size, refcounts, num_hbm_blocks=None, eviction=None, *, what):
        super().__init__(block_size, refcounts, eviction, num_hbm_blocks)
        self.what = what

    def peek(self, tokens, limit=None):
        found = super().peek(tokens, limit)
        return {
            "none": None,
            "blocks alone": found.blocks,
            "a list": Match(found.blocks.tolist(), found.num_tokens),
            "tokens": Match(found.blocks, found.num_tokens + 5),
            "beyond": Match(np.arange(len(tokens) // 16 + 1, dtype=np.int32), (len(tokens) // 16 + 1) * 16),
            "free": Match(np.arange(16, dtype=np.int32) + 1000, 256),
            "nowhere": Match(np.arange(16, dtype=np.int32) + 10**6, 256),
        }[self.what]


FULL = ["workload.max_output_tokens=256", "workload.num_sessions=16", "kvcache.num_hbm_blocks=40"]
TWO_TIERS = ["workload.num_turns=3", "kvcache.num_hbm_blocks=40", "kvcache.num_dram_blocks=40"]
STORE = ["cluster.roles=[colocated,store]", "+per_role.store.kvcache.num_dram_blocks=512", "fetch=cost"]
PLACES = {
    OwnEviction: ("eviction", []),
    ByEnd: ("eviction", TWO_TIERS),
    Alike: ("eviction", TWO_TIERS),
    OwnSwap: ("swap", TWO_TIERS),
    OwnStore: ("store", STORE),
    OwnPlace: ("store", [*STORE, "cluster.roles=[colocated,store,store]"]),
    OwnLimit: ("store", STORE),
    OwnShare: ("store", STORE),
    OwnRebalancing: ("rebalancing", TWO),
    OwnPrediction: ("prediction", [*TWO, "policy=cost_based"]),
    OwnBatching: ("batching", []),
    Otherwise: ("batching", []),
    OwnVictim: ("queue", FULL),
    NamesAnother: ("batching", TWO),
    KeepsBlocks: ("preemption", FULL),
    LosesBlocks: ("preemption", FULL),
    NoMatch: ("index", []),
    OneCosts: ("cost_model", TWO),
    ColumnCosts: ("cost_model", [*TWO, "policy=prompt_tree"]),
    StepCosts: ("cost_model", TWO),
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
        (OwnEviction, "none", "OwnEviction.key gave None: expected a tuple of numbers"),
        (OwnEviction, "number", "OwnEviction.key gave 1: expected a tuple of numbers"),
        (OwnEviction, "key", "OwnEviction.key gave (1.0, None): expected a tuple of numbers"),
        (OwnSwap, "none", "OwnSwap.num_to_use gave None: expected an integer in [0, "),
        (OwnSwap, "half", "OwnSwap.num_to_use gave 0.5: expected an integer in [0, "),
        (OwnStore, "none", "OwnStore.num_offered gave None: expected an integer in [0, "),
        (OwnStore, "number", "OwnStore.num_offered gave 18: expected an integer in [0, 17], blocks of those cached"),
        (OwnPlace, "none", "OwnPlace.place gave None: expected an integer in [0, 1], a row of the stores"),
        (OwnPlace, "half", "OwnPlace.place gave 0.5: expected an integer in [0, 1], a row of the stores"),
        (OwnLimit, "half", "OwnLimit.max_incoming=0.5: expected an integer >= 1"),
        (OwnShare, "half", "OwnShare.num_ahead gave 0.5: expected an integer >= 0, blocks"),
        (OwnRebalancing, "none", "OwnRebalancing.key gave None: expected a tuple of numbers"),
        (OwnPrediction, "none", "OwnPrediction.costs gave None: expected a CostModel"),
        (OwnBatching, "none", "OwnBatching.first gave None: expected a list of requests"),
        (OwnBatching, "number", "OwnBatching.first gave [1]: expected a list of requests"),
        (Otherwise, "none", "Otherwise.otherwise gave None: expected a list of requests"),
        (OwnVictim, "none", "OwnVictim.victim gave None: expected one of the requests that run: 'synthetic-"),
        (OwnVictim, "number", "OwnVictim.victim gave 1: expected one of the requests that run: 'synthetic-"),
        (NamesAnother, "none", "which does not run here: expected those that it was asked of"),
        (KeepsBlocks, "none", "in HBM that nobody else uses: expected them to be freed, or moved to DRAM"),
        (LosesBlocks, "none", "and a block table of []: expected that to be what it holds"),
        (
            NoMatch,
            "none",
            "NoMatch.peek gave None: expected a Match of int32 blocks that are cached, of 16 tokens each",
        ),
        (NoMatch, "blocks alone", "NoMatch.peek gave array([], dtype=int32): expected a Match"),
        (NoMatch, "a list", "NoMatch.peek gave Match(blocks=[], num_tokens=0): expected a Match of int32 blocks"),
        (NoMatch, "tokens", "num_tokens=5): expected a Match of int32 blocks"),
        (NoMatch, "beyond", "expected a Match of int32 blocks that are cached, of 16 tokens each, at most 255 in all"),
        (NoMatch, "free", "num_tokens=256): expected a Match of int32 blocks that are cached"),
        (NoMatch, "nowhere", "num_tokens=256): expected a Match of int32 blocks that are cached"),
        (OneCosts, "infinite", "OneCosts._one_s gave inf: expected a number of seconds >= 0, and at most 146 years"),
        (OneCosts, "no_number", "OneCosts._one_s gave nan: expected a number of seconds >= 0"),
        (ColumnCosts, "infinite", "ColumnCosts._column_s gave [inf, inf]: expected 2 numbers of seconds >= 0, and at"),
        (ColumnCosts, "no_number", "ColumnCosts._column_s gave [nan, nan]: expected 2 numbers of seconds >= 0"),
        (StepCosts, "infinite", "StepCosts.step_time_s gave [inf"),
        (OneCosts, "none", "OneCosts._one_s gave None: expected a number of seconds >= 0"),
        (OneCosts, "negative", "OneCosts._one_s gave -1: expected a number of seconds >= 0"),
        (ColumnCosts, "negative", "ColumnCosts._column_s gave [-1, -1]: expected 2 numbers of seconds >= 0"),
        (ColumnCosts, "none", "ColumnCosts._column_s gave [None, None]: expected 2 numbers of seconds >= 0"),
        (StepCosts, "none", "StepCosts.step_time_s gave [None"),
    ],
)
def test_what_a_method_is_not_to_return_is_refused_by_its_class_its_name_and_the_value(kind, what, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(kind, what)


def test_a_key_that_shrinks_with_what_is_evicted_is_said_of_its_class_and_without_what_we_add_to_it():
    with pytest.raises(
        ValueError, match=r"ByEnd\.key gave \(\d+,\), then \(\d+,\) for the same node: expected it only"
    ):
        run(ByEnd, "none")


def test_an_order_in_which_all_are_alike_has_no_key_that_shrinks_where_leaves_become_longer():
    words = ["kvcache.num_hbm_blocks=80", "kvcache.num_dram_blocks=200", "workload.num_sessions=16"]
    assert run(Alike, "none", *words)["num_finished"] == 48


def test_figures_of_a_workload_are_refused_before_the_run():
    words = ["exec=simulated", "~workload", f"+workload={{_target_: {__name__}.OwnFigures, what: yes}}"]
    with pytest.raises(ValueError, match=r"OwnFigures\.figures=\{'mine': np\.True_\}: expected a mapping of what JSON"):
        LocalCluster(load_config(words))


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
