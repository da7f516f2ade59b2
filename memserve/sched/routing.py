"""Routing policies: which instance serves a request. Pure functions of a snapshot and a seeded generator.

A new policy is one class with one method, named in the config by `policy._target_=my_package.MyPolicy`. Those that look
at cached prefixes are in prefix_routing.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from memserve.mixing import digest64
from memserve.values import is_integer


@dataclass(frozen=True)
class ClusterSnapshot:
    """The instances that can take a request, a row each. To be looked at: columns that are written to raise ValueError.

    labels: their names.  num_requests: int64 [n], dispatched and unfinished; on prefill instances those whose KV
    has not been handed over.  num_tokens: int64 [n], prompt tokens of those.  num_routed: requests routed so far in
    this cluster, those included that were refused then.  num_cached: int64 [n], tokens of this request that each is
    believed to have, at least one token short of all.  queued_work: int64 [n], the policy's `work` of the requests that
    have no first token yet; on decode instances, of all that have not ended. num_lately: float64 [n], requests that
    went to each, of which the latest count most: about 16 an instance. home: the row that the session's latest request
    went to; None for a session that is new, or that has not come for 65,536 others, or whose row is not here.

    now_s: the cluster's clock.  num_decoding: int64 [n], of num_requests those that have their first token.  num_gpus:
    int64 [n], ranks of each (`cluster.tensor_parallel`).  free_blocks: float64 [n], blocks of each one's HBM that no
    request or transfer held when it last said so (free, or cached alone).  num_blocks: float64 [n], all of its HBM's.
    said_s: float64 [n], when that was; in exec=distributed, when it came. Of one that has said nothing yet they are
    infinite, and said_s is -infinite. An instance says so whenever a request has come, gone or been preempted there.
    What its answers have taken since is not in it, nor what is on its way there: it is `now_s - said_s` seconds old,
    which has no bound.
    """

    labels: tuple[str, ...]
    num_requests: np.ndarray
    num_tokens: np.ndarray
    num_routed: int
    num_cached: np.ndarray
    queued_work: np.ndarray
    num_lately: np.ndarray
    home: int | None
    now_s: float
    num_decoding: np.ndarray
    num_gpus: np.ndarray
    free_blocks: np.ndarray
    num_blocks: np.ndarray
    said_s: np.ndarray


@dataclass(frozen=True)
class RouteRequest:
    """What a policy may know of a request. tokens: int32 [num_prompt].  arrival_s: at the client, on the cluster's
    clock.  max_tokens: most that its answer can have.  priority: smaller is more urgent, for queues that look at it.
    class_name: of the workload's class that it is of; "" of none.
    """

    request_id: str
    session_id: str
    tokens: np.ndarray
    arrival_s: float
    max_tokens: int
    priority: int = 0
    class_name: str = ""


class Chosen(int):
    """A row that says in a few words, for the report, why it was taken."""

    why: str

    def __new__(cls, row: int, why: str) -> "Chosen":
        chosen = super().__new__(cls, row)
        chosen.why = why
        return chosen


def is_row(chosen: object, num_rows: int) -> bool:
    """Whether what somebody's rule named is one of so many rows."""
    return is_integer(chosen, 0, num_rows - 1)


class Policy(ABC):
    """A routing policy. looks_at_prefixes: it needs an index source."""

    looks_at_prefixes = False

    @abstractmethod
    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> int:
        """The row of the instance that serves the request; a `Chosen` gives a reason too."""

    def work(self, num_cached: int, num_new: int) -> int:
        """What a request's prefill adds to `queued_work`: an integer from 0 on, in a unit of the policy's own. Here its
        new tokens; of seconds, give nanoseconds (`memserve.clock.to_ns`).
        """
        return num_new

    def answered(  # noqa: B027 # most policies learn nothing from answers: empty, not abstract
        self, request: RouteRequest, label: str, num_generated: int, now_s: float
    ) -> None:
        """A request has ended with an answer of so many tokens; `label` is the instance of this group that it was at,
        of decode instances that which had it last. For policies that learn, as how long answers are.
        """


class Random(Policy):
    """Any instance, uniformly."""

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        return Chosen(int(rng.integers(len(cluster.labels))), "drawn")


class RoundRobin(Policy):
    """Instances in turn."""

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        return Chosen(cluster.num_routed % len(cluster.labels), "its turn")


class LeastLoad(Policy):
    """The fewest unfinished requests, then the fewest prompt tokens; ties by the generator (Table 6, least-load)."""

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        return Chosen(least_loaded(cluster, np.ones(len(cluster.labels), dtype=bool), rng), "least load")


class SessionAffinity(Policy):
    """Every request of a session on the same instance (Table 6, session-ID), by rendezvous hashing.

    Each (session, instance) pair has a fixed score and the highest wins, so when instances join or leave only the
    sessions of those move, and nothing is remembered.
    """

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        scores = [_score(request.session_id, label) for label in cluster.labels]
        return Chosen(int(np.argmax(scores)), "its session's")


class StickyLeastLoad(Policy):
    """A session's requests where its latest one went, which has its KV; a new session's where least load is.

    For decode placement: PD-Caching-2 and 3 send only what the decode instance lacks. A session whose instance is gone,
    or drains, is as a new one (how long one is remembered: `home` of ClusterSnapshot). An instance that joins gets new
    sessions alone.
    """

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> Chosen:
        if cluster.home is not None:
            return Chosen(cluster.home, "its session's")
        anybody = np.ones(len(cluster.labels), dtype=bool)
        return Chosen(least_loaded(cluster, anybody, rng), "least load: a new session")


def least_loaded(cluster: ClusterSnapshot, among: np.ndarray, rng: np.random.Generator) -> int:
    """The fewest requests, then tokens, of the rows where `among` (bool [n]) is true; ties by the generator."""
    rows = np.flatnonzero(among)
    for column in (cluster.num_requests, cluster.num_tokens):
        load = column[rows]
        rows = rows[load == load.min()]
    return any_of(rows, rng)


def any_of(rows: np.ndarray, rng: np.random.Generator) -> int:
    """One of the rows (int [n]), uniformly; the generator is asked only where there is a choice."""
    return int(rows[0]) if len(rows) == 1 else int(rng.choice(rows))


def _score(session_id: str, label: str) -> int:
    """A number of 64 bits that two processes agree on."""
    return digest64(f"{session_id}\0{label}".encode())
