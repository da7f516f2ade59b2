"""Policies that look at who has a request's prefix: the paper's two, the field's practice, and decode placement."""

import numpy as np

from memserve.clock import NS_PER_S, to_ns
from memserve.sched.cost_model.base import CostModel
from memserve.sched.routing import Chosen, ClusterSnapshot, Policy, RouteRequest, any_of, least_loaded
from memserve.values import require_int, require_number

_NEVER_NS = np.iinfo(np.int64).max


class PromptTree(Policy):
    """The longest cached prefix; among equals the least load (section 6, Table 6).

    max_lead: an instance that has so many unfinished requests more than the least loaded one is passed over, so that a
    prefix that every session begins with does not draw them all to where it was seen first; None is the paper's rule.
    Raises ValueError for a lead that is out of range.
    """

    looks_at_prefixes = True

    def __init__(self, max_lead: int | None = None) -> None:
        if max_lead is not None:
            require_int("policy.max_lead", max_lead, 1, allowed="null or an integer >= 1")
        self._max_lead = max_lead

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        cached = cluster.num_cached
        if self._max_lead is not None:
            lead = cluster.num_requests - cluster.num_requests.min()
            cached = np.where(lead < self._max_lead, cached, -1)
        longest, most = cached.max(), cluster.num_cached.max()
        why = "longest prefix but for who leads" if longest < most else _by_prefix(most)
        return Chosen(least_loaded(cluster, cached == longest, rng), why)


class CostBased(Policy):
    """The soonest first token: what is queued there and what this request would cost there (Eq. 1, section 5.3).

    `queued_work` is the sum of Eq. 1 in nanoseconds, kept as requests come and go. A request under way counts as a
    whole until its first token, and decode steps beside it do not count, as in the paper.

    max_skew: an instance that lately took more than so many times the mean of all is passed over, but for the sessions
    that are there already. While nothing queues, Eq. 1 alone sends every session that begins with the same prefix to
    where that was seen first, and the caches of all others stay empty; None is Eq. 1 alone. Raises ValueError for a
    skew out of range.
    """

    looks_at_prefixes = True

    def __init__(self, cost_model: CostModel, max_skew: float | None = None) -> None:
        if not isinstance(cost_model, CostModel):
            raise ValueError(f"policy.cost_model={type(cost_model).__name__}: expected a CostModel")
        self._cost_model, self._max_skew = cost_model, _skew(max_skew)

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        seconds = self._cost_model.exec_time_s(cluster.num_cached, len(request.tokens) - cluster.num_cached)
        ends_ns = cluster.queued_work + np.rint(seconds * NS_PER_S).astype(np.int64)
        soonest = ends_ns.min()
        if self._max_skew is not None:
            ends_ns[_took_most(cluster, self._max_skew)] = _NEVER_NS
        end = ends_ns.min()
        why = "soonest first token but for who took most" if end > soonest else "soonest first token"
        return Chosen(least_loaded(cluster, ends_ns == end, rng), why)

    def work(self, num_cached: int, num_new: int) -> int:
        """Nanoseconds of its prefill."""
        return to_ns(self._cost_model.exec_time_s(num_cached, num_new))


class BalancedPrefix(Policy):
    """The field's practice (SGLang's router): locality, unless the load is uneven.

    Uneven is when the most loaded instance has more than `abs_bound` requests more than the least loaded, and more than
    `rel_bound` times as many: then the least loaded takes it. Else who has the longest prefix, if it is at least
    `min_share` of the prompt; else the least loaded.

    max_skew: as CostBased's, since a load that never becomes uneven leaves a prefix that all sessions begin with where
    it was seen first; None is the practice alone. Raises ValueError for bounds out of range.
    """

    looks_at_prefixes = True

    def __init__(
        self, abs_bound: int = 4, rel_bound: float = 1.5, min_share: float = 0.5, max_skew: float | None = None
    ) -> None:
        require_int("policy.abs_bound", abs_bound, 0)
        require_number("policy.rel_bound", rel_bound, "a finite number >= 1", minimum=1)
        require_number("policy.min_share", min_share, "a number from 0 to 1", minimum=0, maximum=1)
        self._abs_bound, self._rel_bound, self._min_share = abs_bound, rel_bound, min_share
        self._max_skew = _skew(max_skew)

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        most, least = int(cluster.num_requests.max()), int(cluster.num_requests.min())
        cached = cluster.num_cached
        if self._max_skew is not None:
            cached = np.where(_took_most(cluster, self._max_skew), -1, cached)
        longest = int(cached.max())
        if most - least > self._abs_bound and most > self._rel_bound * least:
            why = "least load: it is uneven"
        elif longest < max(self._min_share * len(request.tokens), 1):
            why = "least load: no long prefix"
        else:
            passed_over = longest < cluster.num_cached.max()
            why = "longest prefix but for who took most" if passed_over else _by_prefix(longest)
            return Chosen(least_loaded(cluster, cached == longest, rng), why)
        return Chosen(least_loaded(cluster, cached >= 0, rng), why)


class LeastKV(Policy):
    """The least KV to hold with this request: prompts that are decoded there, and what of this one it lacks.

    For decode placement: the prefix it holds, its load and, where pools are alike, its free memory in one number; a
    prefix wins against a load that is larger by less than the prefix. Ties by load.
    """

    looks_at_prefixes = True

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        held = cluster.num_tokens - cluster.num_cached
        rows = np.flatnonzero(held == held.min())
        fewest = cluster.num_requests[rows]
        return Chosen(any_of(rows[fewest == fewest.min()], rng), "least KV to hold")


def _by_prefix(longest: int) -> str:
    return "longest prefix" if longest > 0 else "least load: nothing is cached"


def _skew(max_skew: float | None) -> float | None:
    if max_skew is not None:
        require_number("policy.max_skew", max_skew, "null or a finite number >= 1", minimum=1)
    return max_skew


def _took_most(cluster: ClusterSnapshot, max_skew: float) -> np.ndarray:
    """bool [n]: who lately took more than max_skew times the mean, but for where the session was; never all.

    A session's first prompt can begin anywhere, and what it shares with others is computed once more at most. To move
    it later is to compute its own history again, each time.
    """
    took_most: np.ndarray = cluster.num_lately > max_skew * cluster.num_lately.sum() / len(cluster.num_lately) + 1
    if cluster.home is not None:
        took_most[cluster.home] = False
    return took_most
