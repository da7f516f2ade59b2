"""Arrivals: when sessions start. One class an arrival process; knows nothing of what the sessions hold.

`rate` is in sessions a second over the whole cluster. Gaps are drawn as they are: neither clipped nor rescaled, so the
expected rate is the asked one. The clock of a run starts at 0; the first session comes after the first gap.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from memserve.clock import MAX_S, NS_PER_S
from memserve.values import require_int, require_number


class Arrivals(ABC):
    """An arrival process. `concurrency` is set by closed-loop ones alone."""

    concurrency: int | None = None

    def check_rate(self, rate: float | None) -> None:
        """Raises ValueError when this process cannot run at `rate`."""
        if rate is None:
            raise ValueError(f"rate=None with arrivals={type(self).__name__}: expected sessions a second, > 0")
        require_number("rate", rate, "a finite number of sessions a second, > 0", minimum=0.0, exclusive=True)

    @abstractmethod
    def times_ns(self, num_sessions: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
        """int64 [num_sessions], ascending: when each session arrives, in nanoseconds."""


def arrival_times_ns(arrivals: Arrivals, num_sessions: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
    """Its `times_ns`. Raises ValueError where they are others than those."""
    times_ns = np.asarray(arrivals.times_ns(num_sessions, rate, rng))
    right = times_ns.shape == (num_sessions,) and (np.issubdtype(times_ns.dtype, np.integer) or not num_sessions)
    if not right or (np.diff(times_ns, prepend=0) < 0).any():
        raise ValueError(f"{type(arrivals).__name__}.times_ns gave {times_ns.dtype} {times_ns}: expected int64 "
                         f"[{num_sessions}] in nanoseconds, from 0 on and ascending")  # fmt: skip
    return times_ns


@dataclass(frozen=True)
class Poisson(Arrivals):
    """Independent, exponentially distributed gaps (the paper's arrivals, section 8)."""

    def times_ns(self, num_sessions: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
        assert rate is not None
        return _cumulative_ns(rng.exponential(1.0 / rate, num_sessions), rate)


@dataclass(frozen=True)
class Gamma(Arrivals):
    """Gamma distributed gaps. cv: their coefficient of variation; 1 is Poisson, above it bursts, below it regular."""

    cv: float = 2.0

    def __post_init__(self) -> None:
        require_number("arrivals.cv", self.cv, "a number in [0.001, 1000]", minimum=1e-3, maximum=1e3)

    def times_ns(self, num_sessions: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
        assert rate is not None
        gaps_s = rng.gamma(self.cv**-2, self.cv**2 / rate, num_sessions)
        return _cumulative_ns(gaps_s, rate)


@dataclass(frozen=True)
class ClosedLoop(Arrivals):
    """`concurrency` sessions at a time: the next one starts when one ends. There is no rate."""

    concurrency: int = 8

    def __post_init__(self) -> None:
        require_int("arrivals.concurrency", self.concurrency, 1)

    def check_rate(self, rate: float | None) -> None:
        if rate is not None:
            raise ValueError(f"rate={rate!r} with arrivals=ClosedLoop: a closed loop has no rate; expected rate=null")

    def times_ns(self, num_sessions: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(num_sessions, dtype=np.int64)


def _cumulative_ns(gaps_s: np.ndarray, rate: float) -> np.ndarray:
    """float64 [n] gaps in seconds -> int64 [n] times in nanoseconds. Raises ValueError when they go beyond those."""
    times_s = np.cumsum(gaps_s)
    if not np.all(times_s < MAX_S):
        raise ValueError(f"rate={rate!r}: {len(gaps_s)} sessions do not arrive within 146 years; expected a higher one")
    times_ns: np.ndarray = np.rint(times_s * NS_PER_S).astype(np.int64)
    return times_ns
