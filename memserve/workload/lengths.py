"""Lengths: how token counts spread around a mean. One class a distribution; knows nothing of what the tokens are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from memserve.values import require_number

MAX_TOKENS = 2**24  # of a prompt or an answer; beyond any model's context


class Lengths(ABC):
    """A distribution of token counts with a given mean; every draw is from 1 to MAX_TOKENS, or ValueError."""

    @abstractmethod
    def draw(self, mean: float, size: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [size] token counts."""


@dataclass(frozen=True)
class Fixed(Lengths):
    """Every length is the mean."""

    def draw(self, mean: float, size: int, rng: np.random.Generator) -> np.ndarray:
        return _whole(np.full(size, mean))


@dataclass(frozen=True)
class Uniform(Lengths):
    """Uniform over mean * [1 - spread, 1 + spread]. spread: in [0, 1]."""

    spread: float = 0.5

    def __post_init__(self) -> None:
        require_number("lengths.spread", self.spread, "a number in [0, 1]", minimum=0.0, maximum=1.0)

    def draw(self, mean: float, size: int, rng: np.random.Generator) -> np.ndarray:
        return _whole(rng.uniform(mean * (1 - self.spread), mean * (1 + self.spread), size))


@dataclass(frozen=True)
class LogNormal(Lengths):
    """Log-normal with the given mean. cv: standard deviation as a share of the mean, > 0 (real chat: about 1)."""

    cv: float = 1.0

    def __post_init__(self) -> None:
        require_number("lengths.cv", self.cv, "a number in (0, 1000]", minimum=0.0, maximum=1e3, exclusive=True)

    def draw(self, mean: float, size: int, rng: np.random.Generator) -> np.ndarray:
        variance = np.log1p(self.cv**2)
        return _whole(rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), size))


def _whole(values: np.ndarray) -> np.ndarray:
    if not np.all(values <= MAX_TOKENS):
        raise ValueError(f"lengths: a length of {values.max():.0f} tokens was drawn, expected at most {MAX_TOKENS}; "
                         "a smaller mean or variation draws shorter ones")  # fmt: skip
    counts: np.ndarray = np.maximum(np.rint(values), 1).astype(np.int64)
    return counts
