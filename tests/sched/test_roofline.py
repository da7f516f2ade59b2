"""A roofline counts what a step cannot avoid, prices columns as numbers, and says when it is of another model."""

import msgspec
import numpy as np
import pytest
import torch

from memserve import LocalCluster, load_config
from memserve.cluster.costs import build_cost_model, geometry_of_model, kv_of, shape_of
from memserve.config.errors import ConfigError
from memserve.kvcache.layout import CacheGeometry
from memserve.model.model_config import ModelConfig
from memserve.model.weights import tensor_shapes
from memserve.sched.cost_model.base import Subject
from memserve.sched.cost_model.fit import MeasuredStep, fit_roofline
from memserve.sched.cost_model.roofline import DataSheet, RooflineCostModel
from memserve.sched.cost_model.work import Shape, StepWork

SHAPE = Shape(
    num_layers=3, hidden_size=64, intermediate_size=160, num_heads=8, num_kv_heads=4, head_dim=16, vocab_size=99
)
GPU = DataSheet(
    tflops=2e-3, hbm_gb_per_s=0.1, hbm_gib=0.01, link_gb_per_s=0.05, host_gb_per_s=0.01, link_latency_s=1e-5
)
PEAK = RooflineCostModel(GPU, SHAPE)
SHARES = {"compute_share": 0.6, "attention_share": 0.3, "bandwidth_share": 0.8, "step_s": 2e-3}
REAL = RooflineCostModel(GPU, SHAPE, 2, **SHARES)
NOW = np.zeros(1, dtype=np.int64)


def columns(*pairs):
    return tuple(np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))


def test_each_share_slows_what_it_is_of_and_nothing_else():
    # 3 layers of 64 x 256 + 128 x 64 + 64 x 320 + 160 x 64 weights, and 8 heads of 16: 4,000 tokens, 8,002,000 pairs
    products_s = 2 * 3 * (64 * 256 + 128 * 64 + 64 * 320 + 160 * 64) * 4000 / 2e9
    pairs_s = 4 * 3 * 128 * 8_002_000 / 2e9
    # 8 x 64 + 2 x 256 + 3 x 160 elements of 2 bytes a token and layer, and a head of 64 x 99 that is read once
    bytes_s = (3 * 1504 * 2 * 4000 + 64 * 99 * 2) / 1e8
    assert PEAK.exec_time_s(0, 4000) == pytest.approx(products_s + pairs_s + bytes_s, rel=1e-12)
    slowed = {
        "compute_share": 2 * products_s + pairs_s + bytes_s,
        "attention_share": products_s + 2 * pairs_s + bytes_s,
        "bandwidth_share": products_s + pairs_s + 2 * bytes_s,
    }
    for name, seconds in slowed.items():
        assert RooflineCostModel(GPU, SHAPE, **{name: 0.5}).exec_time_s(0, 4000) == pytest.approx(seconds, rel=1e-12)
    decode = [
        costs.step_time_s(np.array([299]), np.array([1]), NOW)[0]
        for costs in (PEAK, RooflineCostModel(GPU, SHAPE, bandwidth_share=0.5))
    ]
    assert decode[1] == pytest.approx(2 * decode[0], rel=1e-12)
    assert RooflineCostModel(GPU, SHAPE, step_s=0.25).exec_time_s(0, 4000) == PEAK.exec_time_s(0, 4000) + 0.25


def test_products_are_the_weights_that_are_multiplied():
    config = ModelConfig("llama", 99, 64, 160, 3, 8, 4, 16, 64, tie_embeddings=True)
    multiplied = {name: np.prod(shape) for name, shape in tensor_shapes(config).items() if "norm" not in name}
    work = sum(StepWork(SHAPE).products(5), StepWork(SHAPE).head(5))
    assert work.num_bytes == 2 * sum(multiplied.values())  # the embedding, which is tied, counts as the head
    assert work.flops == 2 * 5 * sum(multiplied.values())


def test_ranks_share_every_product_and_kv_head_but_have_one_at_least():
    whole, two, eight = (StepWork(SHAPE, ranks) for ranks in (1, 2, 8))
    assert sum(work.flops for work in whole.products(7)) == 2 * sum(work.flops for work in two.products(7))
    assert whole.attention(6, 6).num_bytes == 2 * two.attention(6, 6).num_bytes
    assert eight.num_kv_heads == 1 and two.attention(6, 6).flops == 4 * eight.attention(6, 6).flops


def test_the_least_time_of_a_decode_step_is_that_of_reading_weights_and_kv():
    work = StepWork(SHAPE)
    num_bytes = sum(w.num_bytes for w in work.products(1)) + work.head(1).num_bytes + work.attention(1, 300).num_bytes
    rest = work.the_rest(1).num_bytes
    [seconds] = PEAK.step_time_s(np.array([299]), np.array([1]), NOW)
    assert seconds == pytest.approx((num_bytes + rest) / 1e8, rel=1e-12)


def test_the_least_time_of_a_long_prompt_is_that_of_its_operations():
    work, num_new = StepWork(SHAPE), 4000
    flops = sum(w.flops for w in work.products(num_new)) + work.attention(num_new * (num_new + 1) / 2, num_new).flops
    beside = work.the_rest(num_new).num_bytes / 1e8 + work.head(1).num_bytes / 1e8
    assert PEAK.exec_time_s(0, num_new) == pytest.approx(flops / 2e9 + beside, rel=1e-12)


@pytest.mark.parametrize("costs", [PEAK, REAL], ids=["peak", "real"])
def test_columns_and_steps_cost_what_numbers_cost(costs):
    cached, new = columns((0, 1), (0, 40), (7, 1), (100, 33), (0, 0), (5, 0), (900, 2000))
    singles = [costs.exec_time_s(int(x), int(y)) for x, y in zip(cached, new, strict=True)]
    assert costs.exec_time_s(cached, new) == pytest.approx(singles, rel=1e-12)
    assert singles[4] == singles[5] == 0.0
    for x, y, seconds in zip(cached[:4], new[:4], singles, strict=False):
        assert costs.step_time_s(np.array([x]), np.array([y]), NOW)[0] == pytest.approx(seconds, rel=1e-12)


def test_steps_that_are_repeated_cost_what_they_would_one_by_one():
    cached, new = columns((50, 1), (3, 1), (700, 1))
    together = REAL.step_time_s(cached, new, np.arange(5))
    alone = [REAL.step_time_s(cached + more, new, NOW)[0] for more in range(5)]
    assert together == pytest.approx(alone, rel=1e-12) and together[4] > together[0]


def test_operators_do_not_hide_behind_each_other():
    [both] = PEAK.step_time_s(*columns((4000, 1), (0, 500)), NOW)
    [prompt], [answer] = (PEAK.step_time_s(*columns(pair), NOW) for pair in ((0, 500), (4000, 1)))
    kv_s = StepWork(SHAPE).attention(0, 4001).num_bytes / 1e8
    assert answer > kv_s and prompt + kv_s < both < prompt + answer


def test_ranks_pay_for_two_all_reduces_in_a_layer():
    links = {"link_gb_per_s": 1e9, "link_latency_s": 0.0}
    free = RooflineCostModel(DataSheet(2e-3, 0.1, 0.01, host_gb_per_s=0.01, **links), SHAPE, 2)
    paid = RooflineCostModel(GPU, SHAPE, 2)
    num_bytes = 2 * (2 - 1) / 2 * 10 * 64 * 2  # by rings, ten tokens of 64 elements of two bytes
    assert paid.exec_time_s(0, 10) - free.exec_time_s(0, 10) == pytest.approx(6 * (1e-5 + num_bytes / 5e7), rel=1e-6)


def test_a_block_is_swapped_at_the_host_s_rate():
    assert PEAK.swap_time_s(2) == pytest.approx(2 * 16 * 2 * 3 * 4 * 16 * 2 / 1e7)


def test_every_request_in_a_step_takes_the_host_its_time():
    free, paid = (RooflineCostModel(GPU, SHAPE, request_s=seconds) for seconds in (0.0, 1e-3))
    batch = columns((4000, 1), (100, 1), (0, 500))
    assert paid.step_time_s(*batch, NOW) - free.step_time_s(*batch, NOW) == pytest.approx([3e-3])
    assert paid.exec_time_s(0, 10) - free.exec_time_s(0, 10) == pytest.approx(1e-3)


def measured(costs):
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(60):
        size = int(rng.choice([1, 1, 4, 16]))
        cached, new = (
            rng.choice([0, int(rng.integers(1, 3000))], size),
            rng.choice([1, int(rng.integers(2, 900))], size),
        )
        steps.append(MeasuredStep(cached.tolist(), new.tolist(), float(costs.step_time_s(cached, new, NOW)[0])))
    return steps


def test_a_fit_finds_shares_that_predict_what_was_measured():
    truth = RooflineCostModel(GPU, SHAPE, 1, **SHARES)
    found = fit_roofline(measured(truth), GPU, SHAPE)
    assert set(found) == set(SHARES) and all(type(value) is float for value in found.values())
    again = RooflineCostModel(GPU, SHAPE, 1, **found)
    for pairs in ([(0, 700)], [(2000, 300)], [(900, 1)] * 8, [(100, 1), (0, 200)]):
        [expected], [predicted] = (model.step_time_s(*columns(*pairs), NOW) for model in (truth, again))
        assert predicted == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="expected measured steps"):
        fit_roofline([], GPU, SHAPE)


def simulated(*words):
    beside = [] if any(word.startswith("geometry=") for word in words) else ["geometry=llama3_8b"]
    return load_config(["exec=simulated", "tokens=workload", "cost_model=roofline", *beside, *words])


def cost_model(*words):
    return build_cost_model(simulated(*words), None)


def test_words_choose_gpu_shape_and_ranks():
    one = cost_model("geometry=llama3_8b")
    more = cost_model("geometry=llama3_8b", "cost_model/gpu=h200")
    assert one.exec_time_s(0, 1) > more.exec_time_s(0, 1)
    four = ["cost_model/shape=llama3_70b", "cluster.tensor_parallel.every=4"]
    assert cost_model(*four, "geometry=llama3_70b").exec_time_s(0, 2000) > one.exec_time_s(0, 2000)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["geometry=llama2_13b_tp2"], "num_layers=32 on a rank: expected 40, as geometry has"),
        (
            ["geometry=own"],
            "geometry=own: blocks would have the bytes of nobody's KV, expected tokens=workload and the",
        ),
        (["geometry=llama2_13b"], "num_layers=32 on a rank: expected 40, as geometry has"),
        (["cost_model.tensor_parallel=2"], "Could not override 'cost_model.tensor_parallel'"),
        (["+cost_model.tensor_parallel=2"], "cost_model.tensor_parallel=2: .* takes gpu, shape, compute_share"),
        (["geometry=llama3_8b", "geometry.dtype=float32"], "bytes_per_element=2 on a rank: expected 4"),
        (["cluster.tensor_parallel.every=3"], "tensor_parallel.every=3: expected a divisor of geometry.num_kv_heads=8"),
        (["cluster.tensor_parallel.every=0"], "tensor_parallel.every=0: expected an integer >= 1"),
        (["cost_model.compute_share=1.5"], "compute_share=1.5: expected a number above 0, at most 1"),
        (["cost_model.bandwidth_share=0"], "bandwidth_share=0.*: expected a number above 0, at most 1"),
        (["cost_model.step_s=-1"], "step_s=-1.*: expected seconds"),
        (["cost_model.gpu.tflops=0"], "gpu.tflops=0.*: expected a finite number above 0"),
        (["cost_model.gpu.link_latency_s=-1"], "gpu.link_latency_s=-1.*: expected seconds"),
        (["cost_model.shape.num_heads=31"], "shape.num_heads=31: expected a multiple of shape.num_kv_heads=8"),
        (["cost_model.shape.num_layers=0"], "shape.num_layers=0: expected an integer >= 1"),
        (["cost_model.shape=llama3_8b"], r"config: cost_model/shape=NAME"),
    ],
)
def test_what_cannot_be_and_what_is_of_another_model_is_refused_by_name(words, named):
    with pytest.raises(ConfigError, match=named):
        cost_model(*words)


def test_a_model_that_runs_is_compared_by_its_rank_s_sizes():
    whole = ModelConfig("llama", 99, 64, 160, 3, 8, 4, 16, 64)
    kv = {"num_layers": 3, "num_kv_heads": 4, "head_dim": 16, "bytes_per_element": 2}
    rank = msgspec.structs.replace(Subject("m", 1, 1), shape=shape_of(whole), tensor_parallel=1, kv=kv)
    PEAK.check(rank)
    with pytest.raises(ValueError, match="with tensor_parallel=2 has intermediate_size=80 on a rank: expected 160"):
        REAL.check(rank)
    halves = {**shape_of(whole), "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 80}
    REAL.check(msgspec.structs.replace(rank, shape=halves, tensor_parallel=2, kv={**kv, "num_kv_heads": 2}))
    with pytest.raises(ConfigError, match="as the model that runs has"):
        LocalCluster(load_config(["model=tiny", "step_time=model", "cost_model=roofline"]))


def test_a_pool_that_a_gpu_has_no_room_for_beside_its_share_of_the_weights_is_refused_with_what_fits():
    work = StepWork(SHAPE, 2)
    room = GPU.hbm_gib * 2**30 - work.weight_bytes
    REAL.check_pool(int(room))
    with pytest.raises(ValueError, match=r"gpu.hbm_gib=0.01 for .* GiB of weights on a rank and .* of kvcache"):
        REAL.check_pool(int(room) + 2)
    words = ["kvcache.num_hbm_blocks=null", "workload=synthetic", "workload.num_sessions=2"]
    LocalCluster(simulated(*words, "kvcache.hbm_bytes=65GiB"))
    with pytest.raises(ConfigError, match=r"15.0 GiB of weights .* 66.0 GiB of kvcache: expected .* at most 65.0GiB"):
        LocalCluster(simulated(*words, "kvcache.hbm_bytes=66GiB"))


def test_a_rank_s_weights_are_its_share_of_the_model_s():
    whole = StepWork(SHAPE).weight_bytes
    assert whole == SHAPE.bytes_per_element * (3 * (64 * (8 + 8) * 16 + 128 * 64 + 3 * 64 * 160) + 2 * 64 * 99)
    assert StepWork(SHAPE, 2).weight_bytes == whole / 2
    llama = StepWork(Shape(32, 4096, 14336, 32, 8, 128, 128256))
    assert llama.weight_bytes / 2 == pytest.approx(8.03e9, rel=1e-3)  # as its name says, in bf16


def test_what_a_token_s_kv_is_says_layout_and_config_alike():
    cfg = load_config(["exec=simulated", "tokens=workload", "geometry=llama3_8b"])
    assert kv_of(geometry_of_model(cfg, None)) == kv_of(CacheGeometry(32, 16, 8, 128, torch.bfloat16))
