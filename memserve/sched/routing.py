"""Routing policies: which instance serves a request. Pure functions of a snapshot and a seeded generator.

A new policy is one class with one method, named in the config by `policy._target_=my_package.MyPolicy`.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClusterSnapshot:
    """The instances that can take a request, a row each.

    labels: their names.  num_requests: int64 [n], dispatched and unfinished.  num_tokens: int64 [n], prompt tokens of
    those.  num_routed: requests routed so far in this cluster.
    """

    labels: list[str]
    num_requests: np.ndarray
    num_tokens: np.ndarray
    num_routed: int


@dataclass(frozen=True)
class RouteRequest:
    """What a policy may know of a request. tokens: int32 [num_prompt]."""

    request_id: str
    session_id: str
    tokens: np.ndarray


class Policy(ABC):
    """A routing policy."""

    @abstractmethod
    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> int:
        """The row of the instance that serves the request."""


class Random(Policy):
    """Any instance, uniformly."""

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> int:
        return int(rng.integers(len(cluster.labels)))


class RoundRobin(Policy):
    """Instances in turn."""

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> int:
        return cluster.num_routed % len(cluster.labels)


class LeastLoad(Policy):
    """The fewest unfinished requests, then the fewest prompt tokens; ties by the generator (Table 6, least-load)."""

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> int:
        fewest = cluster.num_requests == cluster.num_requests.min()
        tokens = np.where(fewest, cluster.num_tokens, np.iinfo(np.int64).max)
        return int(rng.choice(np.flatnonzero(tokens == tokens.min())))


class SessionAffinity(Policy):
    """Every request of a session on the same instance (Table 6, session-ID), by rendezvous hashing.

    Each (session, instance) pair has a fixed score and the highest wins, so when instances join or leave only the
    sessions of those move, and nothing is remembered.
    """

    def choose(self, request: RouteRequest, cluster: ClusterSnapshot, rng: np.random.Generator) -> int:
        scores = [_score(request.session_id, label) for label in cluster.labels]
        return int(np.argmax(scores))


def _score(session_id: str, label: str) -> int:
    """A number of 64 bits that two processes agree on."""
    return int.from_bytes(hashlib.blake2b(f"{session_id}\0{label}".encode(), digest_size=8).digest(), "little")
