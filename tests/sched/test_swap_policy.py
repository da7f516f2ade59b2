"""swap=cost: what lies in DRAM is brought back only as far as that is cheaper than computing it again."""

import numpy as np
import pytest
from mini_cluster import hash_answer, hash_instance, serve

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.cost_model.operator import OperatorCostModel
from memserve.sched.swap_policy import Cheapest

BLOCK, NUM_HBM = 4, 100
IN_HBM, IN_DRAM = [1, 2], [101, 102, 103]


def costs(swap_block_s):
    return FixedCostModel(0.01, 0.001, 0.001, swap_block_s)


@pytest.mark.parametrize(
    ("swap_block_s", "blocks", "used"),
    [
        (0.0039, IN_HBM + IN_DRAM, 5),
        (0.0041, IN_HBM + IN_DRAM, 2),
        (0.0041, IN_DRAM, 0),
        (0.0041, IN_DRAM + IN_HBM, 5),  # three moves save five blocks
        (9.0, IN_HBM, 2),
        (0.004, IN_DRAM, 3),  # as dear either way
    ],
)
def test_blocks_are_used_as_far_as_that_is_cheapest(swap_block_s, blocks, used):
    policy = Cheapest(costs(swap_block_s), BLOCK)
    assert policy.num_to_use(np.array(blocks, dtype=np.int32), NUM_HBM, 40) == used


def test_only_the_deep_blocks_can_be_worth_a_swap():
    """All or nothing is not the only choice: attention makes late blocks dear, and what is before them comes along."""
    policy = Cheapest(OperatorCostModel([1, 64], [0.0, 0.0063], 1e-4, 1e-4, 2e-4, 0, 0, 0, 0, 0, 0.02), BLOCK)
    blocks = np.arange(NUM_HBM, NUM_HBM + 10)
    best = min(range(11), key=lambda n: (0.02 * n + policy._costs.exec_time_s(4 * n, 48 - 4 * n), -n))
    assert policy.num_to_use(blocks, NUM_HBM, 48) == best


@pytest.mark.parametrize("make", [np.array, lambda seconds: np.broadcast_to(seconds[0], 5)])
def test_a_model_of_one_s_own_may_give_whole_seconds_or_an_array_that_nobody_may_write_to(make):
    class Own(FixedCostModel):
        def _column_s(self, num_cached, num_new):
            return make([3, 3, 3, 3, 3])

    policy = Cheapest(Own(0.01, 0.001, 0.001, 0.1), BLOCK)
    assert policy.num_to_use(np.array([*IN_HBM, *IN_DRAM[:2]], dtype=np.int32), NUM_HBM, 40) == 2


@pytest.mark.parametrize("swap_block_s", [0.0, 0.5])
def test_answers_are_the_same_whatever_is_swapped(swap_block_s):
    instance = hash_instance(
        block_size=4, num_blocks=16, num_dram_blocks=30, swap=Cheapest(costs(swap_block_s), 4), max_context=60
    )
    prompts = {f"r{i}": np.arange(100 * i, 100 * i + 30) for i in range(4)}
    for turn in range(2):
        for name, prompt in prompts.items():
            assert serve(instance, {f"{name}-{turn}": prompt}, 5)[f"{name}-{turn}"] == hash_answer(prompt, 5)
    assert (instance.pool.stats().num_swapped_in > 0) == (swap_block_s == 0.0)


WORDS = ["exec=simulated", "workload=synthetic", "workload.num_sessions=4", "kvcache.num_dram_blocks=50"]


def test_the_word_swap_cost_takes_its_prices_from_the_cost_model():
    [node] = LocalCluster(load_config([*WORDS, "swap=cost", "cost_model=h800_llama2_13b"])).cluster().nodes
    policy = node.instance.scheduler._swap
    assert isinstance(policy, Cheapest) and policy._costs.swap_time_s(10) == pytest.approx(0.0013 + 10 * 4 * 3e-6), (
        "ten blocks of two layers"
    )


def test_cost_aware_eviction_takes_its_price_of_attention_from_the_cost_model():
    words = [*WORDS, "eviction=cost_aware", "eviction.attention_tokens=null"]
    LocalCluster(load_config([*words, "cost_model=h800_llama2_13b"])).run()
    with pytest.raises(ConfigError, match="attention_tokens=null with a cost model in which a token costs the same"):
        LocalCluster(load_config(words))
