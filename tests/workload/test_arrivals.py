import math

import numpy as np
import pytest

from memserve.workload.arrivals import ClosedLoop, Gamma, Poisson


def gaps_s(arrivals, rate: float, n: int = 200_000) -> np.ndarray:
    times_ns = arrivals.times_ns(n, rate, np.random.default_rng(0))
    assert times_ns.dtype == np.int64
    return np.diff(times_ns, prepend=0) / 1e9


@pytest.mark.parametrize("rate", [0.1, 5.0, 4000.0])
def test_poisson_has_the_asked_rate_and_unclipped_exponential_gaps(rate):
    gaps = gaps_s(Poisson(), rate)
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.01)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.02)
    assert gaps.max() > 9 / rate and gaps.min() < 1e-3 / rate  # both tails are there
    assert np.mean(gaps > 3 / rate) == pytest.approx(math.exp(-3), rel=0.05)


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gamma_has_the_asked_rate_and_variation(cv):
    gaps = gaps_s(Gamma(cv=cv), 2.0)
    assert gaps.mean() == pytest.approx(0.5, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_a_closed_loop_has_everyone_ready_at_the_start():
    arrivals = ClosedLoop(concurrency=3)
    assert arrivals.concurrency == 3 and Poisson().concurrency is None
    assert arrivals.times_ns(4, None, np.random.default_rng(0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf, "fast", None, True])
@pytest.mark.parametrize("arrivals", [Poisson(), Gamma()])
def test_a_rate_that_is_no_rate_is_refused(arrivals, rate):
    with pytest.raises(ValueError, match="rate="):
        arrivals.check_rate(rate)


@pytest.mark.parametrize("rate", [1e-11, 1e-300])
@pytest.mark.parametrize("arrivals", [Poisson(), Gamma()])
def test_a_rate_whose_arrivals_no_clock_can_tell_is_refused(arrivals, rate):
    with pytest.raises(ValueError, match=f"rate={rate}: 50 sessions do not arrive within 146 years"):
        arrivals.times_ns(50, rate, np.random.default_rng(0))
    assert np.all(np.diff(arrivals.times_ns(50, 1e-6, np.random.default_rng(0))) > 0)


def test_a_closed_loop_refuses_a_rate():
    ClosedLoop().check_rate(None)
    with pytest.raises(ValueError, match=r"rate=1.0 with arrivals=ClosedLoop"):
        ClosedLoop().check_rate(1.0)


@pytest.mark.parametrize("cv", [0, -1, math.nan, math.inf])
def test_a_bad_variation_is_refused(cv):
    with pytest.raises(ValueError, match=r"arrivals\.cv="):
        Gamma(cv=cv)


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True])
def test_a_bad_concurrency_is_refused(concurrency):
    with pytest.raises(ValueError, match=r"arrivals\.concurrency="):
        ClosedLoop(concurrency=concurrency)
