"""Decisions: where a request went, who is taken to hold what, whether it was fetched or computed (Eq. 2), or moved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np


class Holding(msgspec.Struct, frozen=True):
    """The first num_tokens tokens of a prompt are taken to be cached on an instance (its incarnation)."""

    instance: int
    num_tokens: int


class FetchRecord(msgspec.Struct, frozen=True):
    """One decision of Eq. 2. Tokens found here and usable there; seconds predicted for all num_in_batch requests that
    were decided at once: until the KV has come, and by which prefilling takes longer without it.

    outcome: computed, fetched, refused or failed; of the last two nothing came, for `reason`.  arrived_ns: when the
    last byte was here.  ended_ns: when nothing was waited for any more: what has come is read between two steps.
    earlier: the decisions before this one, of holders from whom nothing came, in their order; each has none of its own.
    """

    holder: int
    num_cached: int
    num_held: int
    num_in_batch: int
    fetch_s: float
    compute_s: float
    chose_fetch: bool
    began_ns: int
    arrived_ns: int | None = None
    ended_ns: int | None = None
    outcome: str = "computed"
    reason: str = ""
    num_fetched: int = 0
    earlier: "tuple[FetchRecord, ...]" = ()

    @property
    def decisions(self) -> "tuple[FetchRecord, ...]":
        """All that were made for the request, this one last."""
        return (*self.earlier, self)


class Migration(msgspec.Struct, frozen=True):
    """A request that was decoded at `source` was to go on at `target` with the KV of its first num_tokens tokens, and
    stood still until it did, or, where that could not take it (not `done`), until it went on elsewhere or at `source`.
    Of 0 tokens it had not stopped.  num_ahead: tokens whose KV went ahead, while it was decoded.
    """

    source: str
    target: str
    num_tokens: int
    done: bool
    num_ahead: int = 0


@dataclass(frozen=True, eq=False)
class RouteChoice:
    """One choice among instances, and what was known of them, a row each. chosen: a row.  why: in the policy's words.

    num_cached: int64 [n], tokens of the prompt that each was believed to have.  num_requests: int64 [n], unfinished.
    queued_ns: int64 [n], the prefills that wait there, by the cost model.  exec_time_s: that model's, of cached and new
    tokens; None where no prefill is placed. Nothing is predicted before somebody asks: a choice takes microseconds.
    """

    labels: Sequence[str]
    chosen: int
    why: str
    num_prompt: int
    num_cached: np.ndarray
    num_requests: np.ndarray
    queued_ns: np.ndarray
    exec_time_s: Callable[[np.ndarray, np.ndarray], np.ndarray] | None

    @cached_property
    def first_token_s(self) -> np.ndarray | None:
        """Seconds until the first token on each instance, float64 [n]: what is queued, and this prefill (Eq. 1)."""
        if self.exec_time_s is None:
            return None
        at: np.ndarray = self.queued_ns * 1e-9 + self.exec_time_s(self.num_cached, self.num_prompt - self.num_cached)
        return at

    @property
    def regret_s(self) -> float | None:
        """Seconds by which the first token is predicted later than where it would come soonest."""
        at = self.first_token_s
        return None if at is None else float(at[self.chosen] - at.min())

    @property
    def elsewhere_s(self) -> float | None:
        """The mean prediction of the other instances; None if there is none."""
        at = self.first_token_s
        return None if at is None or len(at) == 1 else float((at.sum() - at[self.chosen]) / (len(at) - 1))
