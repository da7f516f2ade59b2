"""Classes of a user's own in the place of ours: what one gets wrong is said by its name, and nothing is ignored."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from memserve import LocalCluster, NullIndex, RadixIndex, load_config
from memserve.config.errors import ConfigError
from memserve.config.schema import RunConfig
from memserve.kvcache import Match
from memserve.kvcache.eviction import Eviction
from memserve.kvcache.granularity import ByRequest, Stretch
from memserve.kvcache.hash_index import HashIndex
from memserve.request import Role
from memserve.sampling_params import SamplingParams
from memserve.sched.cost_model.base import CostModel
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.cost_model.transfer import TransferCost
from memserve.sched.heirs import Heir
from memserve.sched.modes import Insert, PDCaching3
from memserve.sched.preemption import SwapOut
from memserve.sched.queue_policy import QueuePolicy
from memserve.sched.rejection import Rejection
from memserve.sched.scaling import Add, Scaling
from memserve.sched.swap_policy import SwapPolicy
from memserve.transfer.link import LinkModel
from memserve.workload.arrivals import Arrivals
from memserve.workload.session import Session, Turn, Workload

SMALL = ["exec=simulated", "workload=synthetic", "workload.num_sessions=6", "workload.num_turns=3", "workload.rate=4"]
APART = ["cluster=1p1d", "mode=pd_caching_3"]
TWO_TIERS = ["kvcache.num_hbm_blocks=40", "kvcache.num_dram_blocks=200"]


def run(*words):
    return LocalCluster(load_config([*SMALL, *words])).run()


def own(group, kind, options=""):
    """The words that put a class of this file into a group's place."""
    return [f"~{group}", f"+{group}={{_target_: {__name__}.{kind.__name__}{options}}}"]


class Given(Workload):
    """What it is told to give. what: a name of this file's GIVEN."""

    def __init__(self, what: str) -> None:
        self.what = what

    def sessions(self, tokenizer, seed):
        return GIVEN[self.what]()


def a_session(arrival_ns=0, dtype=np.int32, session_id="a", suffix=None):
    suffix = np.zeros(0, dtype=np.int32) if suffix is None else suffix
    return Session(session_id, arrival_ns, (Turn(np.arange(50, dtype=dtype), SamplingParams()),), suffix)


GIVEN = {
    "nothing": list,
    "none": lambda: None,
    "text": lambda: ["a"],
    "half": lambda: [a_session(arrival_ns=0.5)],
    "before": lambda: [a_session(arrival_ns=-1)],
    "wide": lambda: [a_session(dtype=np.int64)],
    "number": lambda: [a_session(session_id=7)],
    "list": lambda: [a_session(suffix=[1, 2])],
    "generated": lambda: (session for session in [a_session()]),
}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "Given.sessions gave []: expected a list of sessions, at least one"),
        ("none", "Given.sessions gave None: expected a list of sessions, at least one"),
        ("text", "Given.sessions gave 'a': expected a Session"),
        ("half", "arrival_ns of session 'a'=0.5: expected an integer >= 0"),
        ("before", "arrival_ns of session 'a'=-1: expected an integer >= 0"),
        ("wide", "tokens of a turn of int64, shape (50,): expected an array, int32 [n]"),
        ("number", "session_id=7: expected a string"),
        ("list", "suffix of session 'a' of list, shape (2,): expected an array, int32 [n]"),
    ],
)
def test_what_a_workload_gives_is_played_or_refused(what, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        LocalCluster(load_config(["exec=simulated", *own("workload", Given, f", what: {what}")]))


def test_sessions_that_are_generated_are_played_with_every_seed():
    words = ["exec=simulated", "seeds=2", *own("workload", Given, ", what: generated")]
    assert LocalCluster(load_config(words)).run()["num_finished"] == 1


class InSeconds(Arrivals):
    def times_ns(self, num_sessions, rate, rng):
        return [i / rate for i in range(num_sessions)]


class TooFew(Arrivals):
    def times_ns(self, num_sessions, rate, rng):
        return np.arange(3)


@pytest.mark.parametrize("kind", [InSeconds, TooFew])
def test_arrivals_that_are_no_times_are_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.times_ns gave .* expected int64 \[6\] in nanoseconds"):
        run(f"workload.arrivals._target_={__name__}.{kind.__name__}")


class Flat(CostModel):
    """seconds: of a step."""

    swap_block_s = 0.0

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds

    def _one_s(self, num_cached, num_new):
        return self.seconds

    def _column_s(self, num_cached, num_new):
        return np.full(len(num_new), self.seconds)

    def step_time_s(self, num_cached, num_new, num_more):
        return np.full(len(num_more), self.seconds)


class OneNumber(Flat):
    def step_time_s(self, num_cached, num_new, num_more):
        return self.seconds


class WithoutSwaps(Flat):
    @property
    def swap_block_s(self):
        raise AttributeError("nobody said")


class DoublySlow(FixedCostModel):
    def step_time_s(self, num_cached, num_new, num_more):
        return 2 * super().step_time_s(num_cached, num_new, num_more)


def test_fixed_costs_with_steps_of_ones_own_are_what_time_goes_by():
    words = [f"cost_model._target_={__name__}.DoublySlow"]
    assert run(*words)["ttft_s"]["mean"] >= 2 * run()["ttft_s"]["mean"]


def test_costs_that_are_no_seconds_are_refused():
    assert run(*own("cost_model", Flat))["num_finished"] == 18
    with pytest.raises(ValueError, match=r"Flat\._one_s gave -1: expected a number of seconds >= 0"):
        run(*own("cost_model", Flat, ", seconds: -1"))
    with pytest.raises(ValueError, match=r"OneNumber\.step_time_s gave .*: expected \d+ numbers of seconds >= 0"):
        run(*own("cost_model", OneNumber))
    with pytest.raises(ValueError, match="cost_model=WithoutSwaps has no swap_block_s: expected seconds of a block"):
        run(*own("cost_model", WithoutSwaps))


class Beyond(SwapPolicy):
    """more: than are cached."""

    def __init__(self, more: int) -> None:
        self.more = more

    def num_to_use(self, blocks, num_hbm_blocks, num_tokens):
        return len(blocks) + self.more if self.more > 0 else self.more


@pytest.mark.parametrize("more", [1, -1])
def test_a_swap_policy_uses_blocks_that_are_there(more):
    with pytest.raises(
        ValueError, match=r"Beyond\.num_to_use gave -?\d+: expected an integer in \[0, \d+\], blocks of those"
    ):
        run(*TWO_TIERS, *own("swap", Beyond, f", more: {more}"))


class KeepsAll(PDCaching3):
    def at_prefill_end(self):
        return (Insert(),)


class SaysWords(PDCaching3):
    def at_finish(self):
        return ("insert",)


class Elsewhere(PDCaching3):
    roles = frozenset({Role.PREFILL, Role.COLOCATED})


class ForgetsRoles(PDCaching3):
    def held_after(self, num_prompt, num_generated):
        return {Role.PREFILL: num_prompt}


class HoldsMore(PDCaching3):
    def held_after(self, num_prompt, num_generated):
        return dict.fromkeys(self.roles, num_prompt + num_generated)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            ForgetsRoles,
            r"ForgetsRoles\.held_after\(16, 4\) gave .*: expected 0 to 19 tokens of each of decode, prefill",
        ),
        (HoldsMore, r"HoldsMore\.held_after\(16, 4\) gave .*: expected 0 to 19 tokens"),
        (KeepsAll, r"KeepsAll\.at_prefill_end=.*: expected a HandOff"),
        (SaysWords, r"SaysWords\.at_finish has 'insert': expected Insert or GiveBack"),
        (Elsewhere, r"Elsewhere\.roles=.*: expected .*COLOCATED.* or .*"),
    ],
)
def test_a_mode_whose_roles_cannot_take_its_steps_is_refused(kind, said):
    with pytest.raises(ValueError, match=said):
        run("cluster=1p1d", *own("mode", kind))


class OneEntry(NullIndex):
    """Remembers nothing, and asks for no eviction order."""

    def match(self, tokens, limit=None):
        return Match(np.empty(0, dtype=np.int32), 0)


class StaysPut(RadixIndex):
    moves_blocks = False


def test_an_index_gets_an_eviction_order_if_it_asks_and_a_dram_tier_if_it_can_follow():
    assert run(*own("index", OneEntry))["hit_ratio"] == 0
    assert run(*own("index", StaysPut))["hit_ratio"] > 0
    with pytest.raises(ValueError, match="index=StaysPut contradicts a DRAM tier"):
        run(*own("index", StaysPut), *TWO_TIERS)


class AtOne(Scaling):
    """What it says after a second. It has a constructor of its own."""

    def __init__(self, as_list: bool) -> None:
        self.as_list = as_list

    def next_time_ns(self, last_ns):
        return 10**9 if last_ns is None else None

    def changes(self, loads, now_ns):
        return [Add(Role.COLOCATED)] if self.as_list else Add(Role.COLOCATED)


def test_a_scaling_policy_may_have_a_constructor_of_its_own_and_says_a_list():
    assert run(*own("scaling", AtOne, ", as_list: true"))["membership"]["joined"] == 1
    with pytest.raises(ValueError, match=r"AtOne says Add\(.*\): expected a list of changes"):
        run(*own("scaling", AtOne, ", as_list: false"))


class Halves(LinkModel):
    def duration_ns(self, num_calls, num_bytes):
        return num_bytes / 2


def test_a_link_takes_whole_nanoseconds():
    with pytest.raises(ValueError, match=r"duration_ns of Halves=.*: expected an integer >= 0"):
        run(*APART, f"link._target_={__name__}.Halves")
    with pytest.raises(ValueError, match=r"duration_ns of Halves=0\.5: expected an integer >= 0"):
        TransferCost(Halves(0.0, 1.0), block_bytes=1, block_calls=1, other_calls=0).fetch_time_s(1)


def test_what_was_prepared_on_a_cluster_happens_when_it_is_played_and_is_in_its_report():
    local = LocalCluster(load_config([*SMALL, "cluster=1p2d", "mode=pd_caching_3"]))
    cluster = local.cluster()
    cluster.call_at(300_000_000, lambda: cluster.crash("decode-1"))
    report = local.play(cluster).report
    assert report["num_finished"] == 18 and report["membership"]["lost"] == 1
    for call in (cluster.stop, cluster.resume):
        with pytest.raises(ValueError, match="instance 'nobody' is not in the cluster: expected one of prefill-0"):
            call("nobody")


class Hashed(HashIndex):
    """Ours by another name."""


class Swapped(SwapOut):
    """Ours by another name."""


class Nothing(NullIndex):
    """Ours by another name."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*own("index", Hashed), "kvcache.num_dram_blocks=9"], "index=hash contradicts a DRAM tier"),
        (own("preemption", Swapped), "preemption=swap contradicts kvcache.num_dram_blocks=0"),
        (
            [*own("preemption", Swapped), "kvcache.num_hbm_blocks=9", "kvcache.dram_bytes=0KiB"],
            "preemption=swap contra",
        ),
        ([*own("index", Nothing), "cluster=colocated_2", "fetch=always"], "fetch=always contradicts index=none"),
    ],
)
def test_a_class_derived_from_ours_is_refused_where_ours_is(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config([*SMALL, *words])


class Longest(Rejection):
    def __init__(self, cost_model, most_tokens: int, *, why: str = "too long") -> None:
        self._most_tokens, self._why = most_tokens, why

    def reason(self, prospect):
        return self._why if len(prospect.request.tokens) > self._most_tokens else None


def test_an_option_without_a_default_that_is_not_said_is_asked_for_by_its_name():
    said = f"rejection._target_={__name__}.Longest: expected +rejection.most_tokens=, which it cannot do without"
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config([*SMALL, *own("rejection", Longest)])
    assert run(*own("rejection", Longest, ", most_tokens: 9"))["failures"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig) if field.type is Any])
def test_every_node_that_describes_an_object_says_of_which_class_it_is(name):
    group = "policy@decode_policy" if name == "decode_policy" else name
    with pytest.raises(ConfigError, match=rf"{name}._target_=builtins.dict: expected a class derived from"):
        load_config([f"~{group}", f"+{name}={{_target_: builtins.dict}}"])


class Stays(Heir):
    """share: an attribute, which is nobody's to check before it is used."""

    share = 7.0

    def choose(self, leaving, others):
        return others[-1].label if others else None


class LooksLikeAnHeir:
    share = 0.5

    def choose(self, leaving, others):
        return None


def test_an_heir_is_one_and_takes_a_share_of_a_pool():
    words = ["cluster=colocated_2", "scaling=by_load", "scaling.max_instances=3"]
    with pytest.raises(ValueError, match=r"heir\._target_=.*LooksLikeAnHeir: expected a class derived from Heir"):
        load_config([*SMALL, *words, f"heir._target_={__name__}.LooksLikeAnHeir"])
    with pytest.raises(ValueError, match=r"heir\.shares=1: memserve.sched.heirs.LeastLoadHeir takes share"):
        load_config([*SMALL, *words, "heir=least_load", "+heir.shares=1"])
    with pytest.raises(ValueError, match=r"Stays\.share=7\.0: expected a number in \[0, 1\]"):
        run(*words, f"heir._target_={__name__}.Stays")


class NoOrder(QueuePolicy):
    def key(self, request, num_cached):
        return float("nan")


class NoSuchOrder(Eviction):
    """scale: of when a node was used last."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def key(self, node):
        return (node.last_used * self.scale,)


def test_an_order_of_numbers_that_are_none_or_that_shrink_is_refused():
    with pytest.raises(ValueError, match=r"NoOrder\.key gave nan of '.*': expected a number"):
        run(*own("queue", NoOrder))
    with pytest.raises(ValueError, match=r"NoSuchOrder\.key gave \(nan,\): expected a tuple of numbers"):
        run(*own("eviction", NoSuchOrder, ", scale: nan"))
    with pytest.raises(ValueError, match=r"NoSuchOrder\.key gave .*, then .*: expected it only to grow"):
        run(*own("eviction", NoSuchOrder, ", scale: -1"), "kvcache.num_hbm_blocks=40")


class NoAttention:
    pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.attention=nonsense"], "model.attention='nonsense': expected one of reference, sdpa, sparse, triton"),
        (["model.attention=no.such.Class"], "model.attention=no.such.Class: cannot be imported"),
        ([f"model.attention={__name__}.NoAttention"], "NoAttention: expected a class derived from Attention"),
        (["model.attention=my.Own", "model.compile=true"], "model.attention=my.Own contradicts model.compile=true"),
    ],
)
def test_an_attention_that_is_none_is_refused_also_where_no_model_runs(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config([*SMALL, *words])


class Early(ByRequest):
    """Sends blocks that are not computed yet."""

    asks_at_first_chunk = True

    def stretches(self, posted, ready, num_blocks):
        return [] if posted.all() else [Stretch(0, num_blocks, None)]


class Twice(ByRequest):
    def stretches(self, posted, ready, num_blocks):
        return super().stretches(posted, ready, num_blocks) * 2


@pytest.mark.parametrize("kind", [Early, Twice])
def test_a_granularity_sends_what_is_computed_and_sends_it_once(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.stretches gave Stretch.*: expected blocks from"):
        run(*APART, *own("granularity", kind))
