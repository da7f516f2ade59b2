"""The configurations that tests compose are Hydra's."""

import hydra
import pytest
from fast_compose import compose_fast
from hydra.errors import HydraException
from omegaconf import OmegaConf

from memserve import compose as ours

WORDS = [
    [],
    ["seed=3", "kvcache.block_size=4", "workload.think_time_s=0.5", "model.path='a b=c'"],
    ["cluster=2p1d", "mode=pd_caching_3", "policy@decode_policy=least_load", "link.gb_per_s=1e-3"],
    ["+experiment=h100_llama3_8b", "cost_model/gpu=a100_80g", "kvcache.hbm_bytes=5GiB"],
    ["workload=synthetic", "workload/arrivals=gamma", "workload.arrivals.cv=2", "workload/lengths=lognormal"],
    ["cluster=1p1d", "+per_role.decode.sched.token_budget=512", "+eviction@per_role.decode.eviction=lfu"],
    ["~cost_model", "+cost_model={_target_: tests.Costs, seconds: 0.1}", "exec=simulated"],
    ["cluster=1p1d", "mode=pd_basic", "granularity=packed", "layout=aggregated", "link=ib_400g", "fetch=always"],
    ["exec=simulated", "cost_model=roofline", "geometry=llama3_8b", "exec=emulated", "link=ib_400g"],
    ["exec=simulated", "geometry=llama3_8b", "workload=agent", "policy=prompt_tree_bounded", "eviction=cost_aware"],
    ["exec=distributed", "transport=in_process"],
    ["workload=trace", "index_source=exact", "rejection=early", "migration=live", "rebalancing=by_room", "seed=9"],
    ["scaling=schedule", "scaling.changes=[{at_s: 3, add: decode}]", "++slo.ttft_s=1", "eviction._target_=mine.Own"],
    ["policy=random", "eviction=lfu", "queue=priority", "swap=cost", "preemption=swap", "index=hash"],
    ["exec=distributed", "transport=mapped", "store=write_back", "heir=least_load", "tracking=wandb", "model=tiny"],
]  # fmt: skip
WRONG = [
    ["policy=nobody"],
    ["kvcache.blocksize=4"],
    ["nothing=1"],
    ["a=[", "b"],
    ["seed"],
    ["experiment=h100_llama3_8b"],
]


def composed(compose, words):
    with ours._hydra_apart():
        return compose("run", overrides=words)


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_what_is_composed_fast_is_what_hydra_composes(words):
    expected = composed(hydra.compose, words)
    for _ in range(2):
        cfg = composed(compose_fast, words)
        assert OmegaConf.to_yaml(cfg) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(cfg) == OmegaConf.is_struct(expected)
        cfg.seed = -1  # nobody else's


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_hydra_refuses_is_refused_as_it_refuses_it(words):
    said = []
    for compose in (hydra.compose, compose_fast):
        with pytest.raises(HydraException) as error:
            composed(compose, words)
        said.append(str(error.value))
    assert said[0] == said[1]
