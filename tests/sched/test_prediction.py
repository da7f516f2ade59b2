"""Those who decide by the cost model may know it badly; time goes by it all the same."""

import re

import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.prediction import BiasedPrediction, ExactPrediction
from memserve.sched.swap_policy import Cheapest

COSTS = FixedCostModel(step_s=0.01, prefill_token_s=0.001, decode_token_s=0.0001, swap_block_s=0.02)
SHARED = [
    "exec=simulated", "workload=synthetic", "workload.num_sessions=24", "workload.prefix_tokens=512",
    "workload.rate=40", "workload.share_ratio=8", "workload.prompt_tokens=32", "workload.max_output_tokens=8",
    "cluster=colocated_4",
]  # fmt: skip
LINK = ["link.latency_s=0", "link.gb_per_s=1", "link.message_latency_s=0.008"]  # 32 ms of messages; 512 tokens take 15


def biased(*, seed=0, **options):
    return BiasedPrediction(seed, **options).costs(COSTS)


def rows_of(*words):
    result = LocalCluster(load_config([*SHARED, *words])).run_once()
    return [(t.request_id, t.instance, t.finished_ns) for t in result.timelines]


def test_a_factor_is_of_computing_and_swaps_keep_their_price():
    half = biased(factor=0.5)
    assert half.exec_time_s(100, 10) == COSTS.exec_time_s(100, 10) / 2
    columns = np.array([0, 60]), np.array([70, 10])
    assert half.exec_time_s(*columns).tolist() == (COSTS.exec_time_s(*columns) / 2).tolist()
    steps = np.array([5, 9]), np.array([1, 1]), np.arange(3)
    assert half.step_time_s(*steps).tolist() == (COSTS.step_time_s(*steps) / 2).tolist()
    assert half.swap_time_s(3) == COSTS.swap_time_s(3)
    assert ExactPrediction().costs(COSTS) is COSTS


def test_noise_has_the_mean_and_spread_that_are_asked_for_and_is_the_same_when_asked_again():
    num_new = np.arange(1, 20_001)
    exact, costs = COSTS.exec_time_s(0, num_new), biased(cv=0.5, factor=2)
    errors = costs.exec_time_s(0, num_new) / exact
    assert errors.mean() == pytest.approx(2, rel=0.02) and errors.std() / errors.mean() == pytest.approx(0.5, rel=0.05)
    assert (costs.exec_time_s(0, num_new) == biased(cv=0.5, factor=2).exec_time_s(0, num_new)).all()
    assert [costs.exec_time_s(0, n) for n in (1, 7)] == costs.exec_time_s(0, np.array([1, 7])).tolist()
    assert (costs.exec_time_s(0, num_new) != biased(cv=0.5, factor=2, seed=1).exec_time_s(0, num_new)).all()
    assert abs(np.corrcoef(errors[1:], errors[:-1])[0, 1]) < 0.03


def test_time_and_the_report_s_regret_go_by_the_cost_model_whatever_is_predicted():
    """Of a factor alone Eq. 1 takes no notice: all instances are as much off."""
    assert rows_of("policy=cost_based") == rows_of("policy=cost_based", "prediction=biased", "prediction.factor=7")
    exact, noisy = (
        LocalCluster(load_config([*SHARED, "policy=cost_based", *words])).run()["routing"]
        for words in ([], ["prediction=biased", "prediction.cv=2"])
    )
    assert exact["mean_regret_s"] == 0 and noisy["mean_regret_s"] > 0 and noisy["soonest_ratio"] < 1


def test_fetching_follows_what_computing_is_predicted_to_take():
    words = ["policy=round_robin", "fetch=cost", *LINK, "workload.rate=5"]
    fetched = {
        factor: LocalCluster(load_config([*SHARED, *words, *chosen])).run()["tokens"]["fetched"]
        for factor, chosen in {
            1: [],
            0.1: ["prediction=biased", "prediction.factor=0.1"],
            10: ["prediction=biased", "prediction.factor=10"],
        }.items()
    }
    assert fetched[0.1] == 0 < fetched[10] and fetched[1] in (fetched[0.1], fetched[10])


def test_swapping_in_follows_what_computing_is_predicted_to_take():
    """Four blocks in DRAM of 20 ms each: 64 tokens take 64 ms to compute, or are thought to take half or twice that."""
    blocks = np.arange(100, 104)
    used = [Cheapest(costs, 16).num_to_use(blocks, 100, 80) for costs in (biased(factor=0.5), biased(factor=2))]
    assert used == [0, 4]


def test_early_rejection_refuses_by_what_is_predicted_to_wait_too():
    words = [*SHARED, "rejection=early", "slo.ttft_s=0.1", "workload.rate=400"]
    refused = {
        factor: LocalCluster(load_config([*words, "prediction=biased", f"prediction.factor={factor}"])).run()[
            "failures"
        ]
        for factor in (0.01, 1, 5)
    }
    assert refused[0.01] == {} and 0 < refused[1].get("refused", 0) < refused[5]["refused"]
    exact = LocalCluster(load_config(words)).run()["failures"]
    assert exact == refused[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prediction=biased"], "prediction=BiasedPrediction where nobody predicts: expected prediction=exact, or"),
        (["policy=cost_based", "prediction=biased", "prediction.factor=0"], "prediction.factor=0"),
        (["policy=cost_based", "prediction=biased", "prediction.cv=-1"], "prediction.cv=-1"),
        (["policy=cost_based", "prediction=biased", "+prediction.seed=3"], "prediction.seed=3: memserve.sched.predict"),
        (["fetch=cost", "prediction=fitted", "prediction.path=none"], "prediction: cost_model.path=none: expected a"),
    ],
)
def test_a_prediction_that_nobody_asks_for_or_that_is_none_is_refused(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        LocalCluster(load_config([*SHARED, *words]))


@pytest.mark.parametrize(
    "words",
    [
        ["swap=never", "+swap@per_role.decode.swap=cost"],
        ["swap=cost", "+swap@per_role.decode.swap=never"],
    ],
)
def test_a_prediction_may_be_asked_for_by_the_instances_of_one_role_alone(words):
    words = ["cluster=1p1d", "mode=pd_caching_3", "kvcache.num_dram_blocks=64", "prediction=biased", *words]
    assert LocalCluster(load_config([*SHARED, *words])).run()["num_failed"] == 0


def test_a_prediction_that_no_role_s_instances_ask_for_is_refused():
    nobody = ["cluster=1p1d", "mode=pd_caching_3", "kvcache.num_dram_blocks=64", "swap=cost"]
    never = [f"+swap@per_role.{role}.swap=never" for role in ("prefill", "decode")]
    with pytest.raises(ConfigError, match="where nobody predicts"):
        load_config([*SHARED, *nobody, *never, "prediction=biased"])
