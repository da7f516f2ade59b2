"""What is said of one role's instances alone: how it changes what is for all, and what is refused by name."""

import re

import pytest

from memserve import load_config
from memserve.compose import to_dict
from memserve.config.errors import ConfigError
from memserve.config.per_role import OPTIONS, num_ranks, of_role, option_of_role
from memserve.request import Role

BOTH = ["exec=simulated", "cluster=1p1d", "mode=pd_caching_3"]


def test_options_change_and_classes_are_replaced_for_that_role_alone():
    words = [
        "eviction=cost_aware", "+per_role.decode.sched.token_budget=512", "+eviction@per_role.decode.eviction=lfu",
        "+per_role.decode.cost_model.step_s=0.5",
    ]  # fmt: skip
    cfg = load_config([*BOTH, *words])
    decode, prefill = of_role(cfg, Role.DECODE), of_role(cfg, Role.PREFILL)
    assert prefill is cfg and cfg.sched.token_budget == 2048 and cfg.cost_model["step_s"] == 0.01
    assert (decode.sched.token_budget, decode.sched.max_running) == (512, 256)
    assert dict(decode.eviction) == {"_target_": "memserve.kvcache.eviction.LFU"}
    assert dict(decode.cost_model) == {**cfg.cost_model, "step_s": 0.5}
    rest = {name: value for name, value in to_dict(decode).items() if name not in ("eviction", "sched", "cost_model")}
    assert rest == {name: to_dict(cfg)[name] for name in rest} | {"per_role": {role: {} for role in Role}}
    assert of_role(decode, Role.DECODE) is decode


def test_one_option_of_a_role_is_that_of_its_whole_configuration():
    words = ["eviction=cost_aware", "+eviction@per_role.decode.eviction=lfu", "+per_role.decode.cost_model.step_s=0.5",
             "+per_role.decode.kvcache.num_hbm_blocks=9", "+per_role.decode.sched.token_budget=512"]  # fmt: skip
    cfg = load_config([*BOTH, *words])
    for role in (Role.PREFILL, Role.DECODE):
        for name in OPTIONS:
            assert option_of_role(cfg, role, name) == getattr(of_role(cfg, role), name), (role, name)
    assert option_of_role(cfg, "decode", "kvcache").num_hbm_blocks == 9 and cfg.kvcache.num_hbm_blocks == 2048


def test_an_object_within_a_node_can_be_another_for_a_role():
    words = ["tokens=workload", "geometry=llama3_8b", "cost_model=roofline"]
    cfg = load_config([*BOTH, *words, "+cost_model/gpu@per_role.decode.cost_model.gpu=a100_80g"])
    assert cfg.cost_model["gpu"]["tflops"] == 989
    assert of_role(cfg, "decode").cost_model["gpu"]["tflops"] == 312
    assert of_role(cfg, "decode").cost_model["shape"] == cfg.cost_model["shape"]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("+per_role.colocated.sched.token_budget=5", "per_role.colocated contradicts cluster.roles=['prefill', 'decod"),
        ("+per_role.decode.model.dtype=bfloat16", "per_role.decode.model={'dtype': 'bfloat16'}: expected one of batch"),
        ("+layout@per_role.decode.layout=aggregated", "per_role.decode.layout="),
        ("+per_role.decode.kvcache.block_size=4", "kvcache.block_size=4: expected kvcache.block_size=, since blocks"),
        ("+per_role.decode.sched=5", "per_role.decode.sched=5: expected options of sched"),
        ("+per_role.decode.sched.token_budget=0", "per_role.decode: sched.token_budget=0: expected an integer >= 1"),
        ("+per_role.decode.sched.token_budget=x", "per_role.decode: sched.token_budget='x': expected an integer"),
        ("+per_role.decode.sched.budget=1", "per_role.decode: sched.budget: no such option; expected one of token_bud"),
        ("+per_role.decode.kvcache.hbm_bytes=1GiB", "per_role.decode: kvcache.hbm_bytes=1GiB contradicts kvcache.num_"),
        ("+per_role.decode.eviction={_target_: os.path}", "per_role.decode: eviction._target_=os.path: expected a cla"),
        ("+per_role.decode.eviction.foo=3", "per_role.decode: eviction.foo=3: memserve.kvcache.eviction.LRU takes"),
        (
            "+preemption@per_role.prefill.preemption=swap",
            "per_role.prefill: preemption=swap contradicts kvcache.num_dr",
        ),
        ("per_role.decode=5", "per_role.decode"),
        ("+per_role.somebody.sched.token_budget=5", "per_role.somebody: no such option; expected one of colocated, pr"),
        ("per_role.decode.sched.token_budget=5", "per_role.decode.sched"),
    ],
)
def test_what_cannot_be_said_of_a_role_is_refused_by_name(word, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config([*BOTH, word])


def test_ranks_are_every_instance_s_unless_a_role_has_its_own():
    words = ["tokens=workload", "geometry=llama3_8b", "cluster.tensor_parallel.every=4"]
    assert num_ranks(load_config([*BOTH, *words]), "decode") == 4
    cfg = load_config([*BOTH, *words, "cluster.tensor_parallel.decode=2"])
    assert (num_ranks(cfg, Role.DECODE), num_ranks(cfg, Role.PREFILL)) == (2, 4)
