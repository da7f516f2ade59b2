"""Decisions: where a request went, who is taken to hold what, and whether it was fetched or computed (Eq. 2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np


class Holding(msgspec.Struct, frozen=True):
    """The first num_tokens tokens of a prompt are taken to be cached on an instance (its incarnation)."""

    instance: int
    num_tokens: int


class FetchRecord(msgspec.Struct, frozen=True):
    """One decision of Eq. 2. Tokens found here and usable there; seconds predicted for all num_in_batch requests that
    were decided at once: until the KV has come, and by which prefilling takes longer without it.

    outcome: computed, fetched, refused or failed; the last two were computed too, for `reason`.
    """

    holder: int
    num_cached: int
    num_held: int
    num_in_batch: int
    fetch_s: float
    compute_s: float
    chose_fetch: bool
    began_ns: int
    ended_ns: int | None = None
    outcome: str = "computed"
    reason: str = ""
    num_fetched: int = 0


@dataclass(frozen=True, eq=False)
class RouteChoice:
    """One choice among instances, and what was known of them, a row each. chosen: a row.  why: in the policy's words.

    num_cached: int64 [n], tokens of the prompt that each was believed to have.  num_requests: int64 [n], unfinished.
    first_token_s: float64 [n], seconds by the cost model: what is queued there, and this prefill (Eq. 1); None where no
    prefill is placed.
    """

    labels: Sequence[str]
    chosen: int
    why: str
    num_cached: np.ndarray
    num_requests: np.ndarray
    first_token_s: np.ndarray | None

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
