"""Fetch policy: whether KV that another instance holds is fetched or computed here (Eq. 2). Knows no message."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memserve.sched.cost_model.base import CostModel
from memserve.sched.cost_model.transfer import TransferCost


@dataclass(frozen=True)
class Choice:
    """One request of a batch, in tokens. num_cached: found here.  num_held: usable there; more, both whole blocks."""

    num_tokens: int
    num_cached: int
    num_held: int


@dataclass(frozen=True)
class FetchPrices:
    """Both sides of Eq. 2. block_size: tokens."""

    costs: CostModel
    transfer: TransferCost
    block_size: int

    def fetch_time_s(self, choices: Sequence[Choice]) -> float:
        """Seconds until all of what is missing has come, one transfer after the other."""
        return sum(self.transfer.fetch_time_s((c.num_held - c.num_cached) // self.block_size) for c in choices)

    def compute_time_s(self, choices: Sequence[Choice]) -> float:
        """Seconds by which prefilling the batch takes longer without what could be fetched."""
        total, cached, held = np.array([(c.num_tokens, c.num_cached, c.num_held) for c in choices]).T
        once = np.zeros(1, dtype=np.int64)
        with_it, without = (self.costs.steps_s(x, total - x, once)[0] for x in (held, cached))
        return float(without - with_it)


class FetchPolicy(ABC):
    """Decides once for all requests of a batch. looks_elsewhere: there is something to decide."""

    looks_elsewhere = True

    @abstractmethod
    def fetches(self, fetch_s: float, compute_s: float) -> bool:
        """Whether to fetch, given the seconds that each way is predicted to take."""


class NeverFetch(FetchPolicy):
    """Compute, and ask nobody: no request waits for a decision, and none is recorded."""

    looks_elsewhere = False

    def fetches(self, fetch_s: float, compute_s: float) -> bool:
        return False


class AlwaysFetch(FetchPolicy):
    """Fetch whatever another instance holds more of."""

    def fetches(self, fetch_s: float, compute_s: float) -> bool:
        return True


class FetchIfCheaper(FetchPolicy):
    """Eq. 2: transfer(y, y') <= exec(x, y) - exec(x, y')."""

    def fetches(self, fetch_s: float, compute_s: float) -> bool:
        return fetch_s <= compute_s
