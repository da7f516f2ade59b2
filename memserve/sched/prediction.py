"""Prediction: how well those who decide by the cost model know it. Knows no decision; generates no time.

A policy that asks for costs, Eq. 2, early rejection and `swap=cost` are given what this makes of the configured cost
model. Steps in virtual time, and the predictions and the regret that a report shows, go by the cost model itself.
"""

import math
from abc import ABC, abstractmethod

import numpy as np

from memserve.mixing import GOLDEN64, MASK64, mix64
from memserve.sched.cost_model.base import CostModel
from memserve.sched.cost_model.fitted import FittedCostModel
from memserve.values import require_number


class Prediction(ABC):
    """Makes the costs that deciders are given."""

    @abstractmethod
    def costs(self, exact: CostModel) -> CostModel:
        """exact: the configured cost model, of one role's instances."""


class ExactPrediction(Prediction):
    """What steps take, to the nanosecond where time is modelled: an oracle, which nobody has outside a simulation."""

    def costs(self, exact: CostModel) -> CostModel:
        return exact


class BiasedPrediction(Prediction):
    """The cost model's seconds of computing times `factor`, times log-normal noise of mean 1.

    cv: the noise's standard deviation over its mean; 0: none.  seed: of the noise, which is a function of it and of
    what is predicted: who asks the same twice is told the same. Swaps and transfers keep their price, so that a factor
    shifts Eq. 2. Raises ValueError for numbers out of range.
    """

    def __init__(self, seed: int, factor: float = 1.0, cv: float = 0.0) -> None:
        require_number("prediction.factor", factor, "a number in [0.001, 1000]", minimum=1e-3, maximum=1e3)
        require_number("prediction.cv", cv, "a number in [0, 10]", minimum=0.0, maximum=10.0)
        self._seed, self._factor, self._cv = seed, factor, cv

    def costs(self, exact: CostModel) -> CostModel:
        return BiasedCosts(exact, self._seed, self._factor, self._cv)


class FittedPrediction(Prediction):
    """Another model than the one that time goes by: costs that were measured, of whatever machine and model.

    path: a file of scripts/profile_cost_model.py.  level: operator or arch. Raises ValueError for a file that is none.
    """

    def __init__(self, path: str, level: str = "operator") -> None:
        try:
            self._fitted = FittedCostModel(path, level, allow_other_machine=True)
        except ValueError as error:
            raise ValueError(f"prediction: {error}") from error

    def costs(self, exact: CostModel) -> CostModel:
        self._fitted.block_size = exact.block_size
        return self._fitted


class BiasedCosts(CostModel):
    """See BiasedPrediction. exact: what it is off from."""

    def __init__(self, exact: CostModel, seed: int, factor: float, cv: float) -> None:
        self._exact, self._factor = exact, factor
        self._sigma = math.sqrt(math.log1p(cv * cv))  # of the logarithm of a log-normal number with that cv
        self._state = mix64(seed & MASK64)

    def _one_s(self, num_cached: int, num_new: int) -> float:
        errors = self._errors(np.array([num_cached]), np.array([num_new]))
        return self._exact.exec_time_s(num_cached, num_new) * float(errors[0])

    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        seconds: np.ndarray = self._exact.exec_time_s(num_cached, num_new) * self._errors(num_cached, num_new)
        return seconds

    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        """The noise is of all tokens that the batch has cached, and of all new ones."""
        cached = num_cached.sum() + len(num_cached) * num_more
        errors = self._errors(cached, np.full_like(cached, num_new.sum()))
        seconds: np.ndarray = self._exact.steps_s(num_cached, num_new, num_more) * errors
        return seconds

    def swap_time_s(self, num_blocks: int) -> float:
        return self._exact.swap_time_s(num_blocks)

    def _errors(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """What the exact seconds are multiplied by: float64 [n], of int64 columns [n]."""
        if not self._sigma:
            return np.full(len(num_cached), self._factor)
        words = mix64(num_cached.astype(np.uint64) + np.uint64(self._state))
        words = mix64(words + num_new.astype(np.uint64))
        first, second = (_uniform(mix64(words + np.uint64(i * GOLDEN64 & MASK64))) for i in (1, 2))
        normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)  # Box and Muller, 1958
        errors: np.ndarray = self._factor * np.exp(self._sigma * normal - self._sigma**2 / 2)
        return errors


def _uniform(words: np.ndarray) -> np.ndarray:
    """uint64 [n] to float64 [n] in (0, 1)."""
    numbers: np.ndarray = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return numbers
