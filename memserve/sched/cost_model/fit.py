"""Fit: from measured steps to a cost model's parameters. NumPy alone; knows no machine and no file.

Each step is weighted by 1 / its seconds, so that what is minimised is the relative error: a decode step of a few
milliseconds counts as much as a prefill of seconds.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import msgspec
import numpy as np

from memserve.sched.cost_model.arch import ArchCostModel, arch_features
from memserve.sched.cost_model.base import CostModel
from memserve.sched.cost_model.operator import TERMS, OperatorCostModel, operator_features
from memserve.sched.cost_model.roofline import DataSheet, RooflineCostModel, step_totals
from memserve.sched.cost_model.work import Shape

SHARES = ("compute_share", "attention_share", "bandwidth_share")
STARTS = (0.1, 0.5, 0.9)  # of a data sheet's rates, and of the shortest step


class MeasuredStep(msgspec.Struct, frozen=True):
    """One step as it was measured. Per request, tokens in the cache before it and computed in it.

    seconds: median of its repeats.  spread: half the distance between their quartiles, as a share of the median.
    """

    num_cached: list[int]
    num_new: list[int]
    seconds: float
    spread: float = 0.0

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [R] each."""
        return np.array(self.num_cached, dtype=np.int64), np.array(self.num_new, dtype=np.int64)


def fit_operators(steps: Sequence[MeasuredStep], tokens: Sequence[int], swap_block_s: float = 0.0) -> OperatorCostModel:
    """The operator-level model, no parameter negative. tokens: the points of its linear part.

    Raises ValueError for points that no step lies near: their seconds would be made up.
    """
    features_MN = np.array([operator_features(*step.columns(), tokens) for step in steps])
    unknown = [t for t, column in zip(tokens, features_MN.T[: len(tokens)], strict=True) if not column.any()]
    if unknown:
        raise ValueError(f"tokens={unknown}: no measured step has about so many")
    found = nonnegative_least_squares(*_relative(features_MN, steps)).tolist()
    linear_s, terms = found[: len(tokens)], dict(zip(TERMS, found[len(tokens) :], strict=True))
    return OperatorCostModel(tokens, linear_s, **terms, swap_block_s=swap_block_s)


def fit_arch(steps: Sequence[MeasuredStep], swap_block_s: float = 0.0) -> ArchCostModel:
    """The arch-level model, from the steps of one request: it knows no others."""
    alone = [step for step in steps if len(step.num_new) == 1]
    features_MN = np.concatenate([arch_features(*step.columns()) for step in alone])
    weighted_MN, ones_M = _relative(features_MN, alone)
    scales_N = np.linalg.norm(weighted_MN, axis=0)
    surface, *_ = np.linalg.lstsq(weighted_MN / scales_N, ones_M)
    return ArchCostModel((surface / scales_N).tolist(), swap_block_s)


def fit_roofline(
    steps: Sequence[MeasuredStep], gpu: DataSheet, shape: Shape, tensor_parallel: int = 1
) -> dict[str, float]:
    """The shares and step_s of RooflineCostModel with the least mean error: the best of searches from several points.

    Raises ValueError where there is no step.
    """
    if not steps:
        raise ValueError("steps=[]: expected measured steps")

    names = (*SHARES, "step_s")
    totals_M6 = np.array([step_totals(*step.columns()) for step in steps])
    seconds_M = np.array([step.seconds for step in steps])

    @cache  # most of those beside a point are beside the next one, too
    def error(found: tuple[float, ...]) -> float:
        model = RooflineCostModel(gpu, shape, tensor_parallel, **dict(zip(names, found, strict=True)))
        predicted_M = model.total_s(totals_M6)
        return float(np.abs(predicted_M / seconds_M - 1).mean())

    shortest_s = float(seconds_M.min())
    starts = [(*(share for _ in SHARES), part * shortest_s) for share in STARTS for part in STARTS]
    best = min((_descend(error, start) for start in starts), key=error)
    return dict(zip(names, best, strict=True))


def _descend(error: Callable[[tuple[float, ...]], float], found: tuple[float, ...]) -> tuple[float, ...]:
    """Scales all of them, each by one of three factors that come nearer to 1, as long as the error falls.

    found: SHARES, each 1 at most, and seconds.
    """
    most = (*(1.0 for _ in SHARES), np.inf)
    least, factor = error(found), 2.0
    while factor > 1.01:
        factors = itertools.product((1 / factor, 1.0, factor), repeat=len(found))
        beside = [tuple(min(x * by, limit) for x, by, limit in zip(found, each, most, strict=True)) for each in factors]
        errors = [error(other) for other in beside]
        if min(errors) < least - 1e-6:
            least, found = min(errors), beside[int(np.argmin(errors))]
        else:
            factor **= 0.5
    return found


def relative_errors(model: CostModel, steps: Sequence[MeasuredStep]) -> np.ndarray:
    """float64 [steps]: (predicted - measured) / measured."""
    once = np.zeros(1, dtype=np.int64)
    return np.array([model.step_time_s(*step.columns(), once)[0] / step.seconds - 1 for step in steps])


def nonnegative_least_squares(a_MN: np.ndarray, b_M: np.ndarray) -> np.ndarray:
    """The x >= 0 (float64 [N]) with the least |a x - b|: the active-set method of Lawson and Hanson (1974, ch. 23)."""
    scales_N = np.linalg.norm(a_MN, axis=0)
    scales_N[scales_N == 0] = 1.0
    a_MN = a_MN / scales_N
    x_N = np.zeros(a_MN.shape[1])
    free_N = np.zeros(a_MN.shape[1], dtype=bool)
    for _ in range(10 * len(x_N)):
        gradient_N = np.where(free_N, -np.inf, a_MN.T @ (b_M - a_MN @ x_N))
        if gradient_N.max() <= 1e-10:
            break
        free_N[np.argmax(gradient_N)] = True
        x_N = _solve_free(a_MN, b_M, x_N, free_N)
    result: np.ndarray = x_N / scales_N
    return result


def _solve_free(a_MN: np.ndarray, b_M: np.ndarray, x_N: np.ndarray, free_N: np.ndarray) -> np.ndarray:
    """Least squares over the free columns; those that would become negative are fixed at 0 (in free_N too)."""
    while True:
        wanted_N = np.zeros_like(x_N)
        wanted_N[free_N] = np.linalg.lstsq(a_MN[:, free_N], b_M)[0]
        bad_N = free_N & (wanted_N < 0)
        if not bad_N.any():
            return wanted_N
        share = (x_N[bad_N] / (x_N[bad_N] - wanted_N[bad_N])).min()
        x_N = x_N + share * (wanted_N - x_N)
        x_N[bad_N & (x_N <= 1e-14)] = 0.0
        free_N &= x_N > 0


def _relative(features_MN: np.ndarray, steps: Sequence[MeasuredStep]) -> tuple[np.ndarray, np.ndarray]:
    seconds_M = np.array([step.seconds for step in steps])
    return features_MN / seconds_M[:, None], np.ones(len(steps))
