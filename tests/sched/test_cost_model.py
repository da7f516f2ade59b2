"""Cost models: columns agree with single numbers, a fit finds what was put in, files of other places are refused."""

import msgspec
import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.cluster.costs import build_cost_model, subject_of
from memserve.config.errors import ConfigError
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams
from memserve.sched.cost_model.arch import ArchCostModel
from memserve.sched.cost_model.base import Subject, attention_tokens
from memserve.sched.cost_model.fit import (
    MeasuredStep,
    fit_arch,
    fit_operators,
    nonnegative_least_squares,
    relative_errors,
)
from memserve.sched.cost_model.fitted import CostFile, FittedCostModel, Provenance
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.cost_model.operator import OperatorCostModel

POINTS = [1, 8, 64, 512]
TRUTH = {
    "tokens": POINTS, "linear_s": [0.02, 0.03, 0.1, 0.7], "causal_pair_s": 3e-7, "prefix_pair_s": 5e-7,
    "own_pair_s": 4e-7, "prefix_token_s": 2e-6, "decode_token_s": 4e-6, "prefill_request_s": 1e-3,
    "decode_request_s": 1e-4, "mixed_s": 2e-3, "swap_block_s": 1e-3,
}  # fmt: skip
OPERATOR = OperatorCostModel(**TRUTH)
ARCH = ArchCostModel([0.01, 1e-5, 1e-3, 1e-9, 1e-8, 1e-7])
FIXED = FixedCostModel(0.01, 0.001, 0.002, 0.0005)


def batch_of(*pairs, num_steps=1):
    """(cached, new) of each request, prompts of their sum."""
    requests = []
    for number, (num_cached, num_new) in enumerate(pairs):
        prompt = np.zeros(num_cached + num_new, dtype=np.int32)
        requests.append(Request(str(number), prompt, SamplingParams()))
        requests[-1].num_computed = num_cached
    return ScheduledBatch(requests, [new for _, new in pairs], num_steps)


def step(*pairs):
    cached, new = (list(column) for column in zip(*pairs, strict=True))
    return MeasuredStep(cached, new, OPERATOR.step_times_ns(batch_of(*pairs))[0] * 1e-9)


@pytest.mark.parametrize("costs", [OPERATOR, ARCH, FIXED], ids=["operator", "arch", "fixed"])
def test_columns_cost_what_their_numbers_cost_one_by_one(costs):
    cached = np.array([0, 0, 7, 100, 0, 5, 900])
    new = np.array([1, 40, 1, 33, 0, 0, 2000])
    singles = [costs.exec_time_s(int(x), int(y)) for x, y in zip(cached, new, strict=True)]
    assert costs.exec_time_s(cached, new) == pytest.approx(singles, rel=1e-12)
    assert costs.exec_time_s(np.array([0, 16]), 40) == pytest.approx([costs.exec_time_s(x, 40) for x in (0, 16)])
    assert singles[4] == singles[5] == 0.0


@pytest.mark.parametrize("costs", [OPERATOR, ARCH], ids=["operator", "arch"])
def test_a_step_of_one_prompt_takes_what_exec_says(costs):
    for pair in [(0, 40), (16, 40), (33, 1), (0, 3000)]:
        assert costs.step_times_ns(batch_of(pair))[0] == round(costs.exec_time_s(*pair) * 1e9)


@pytest.mark.parametrize("costs", [OPERATOR, ARCH, FIXED], ids=["operator", "arch", "fixed"])
def test_a_batch_repeated_n_times_takes_what_n_batches_take_to_the_nanosecond(costs):
    pairs = [(30, 1), (77, 1), (500, 1)]
    singles = [costs.step_times_ns(batch_of(*((x + i, 1) for x, _ in pairs)))[0] for i in range(50)]
    assert costs.step_times_ns(batch_of(*pairs, num_steps=50)) == singles


def test_a_step_of_both_kinds_pays_for_both_ways_of_attention_once():
    chunk, decode = (0, 40), (100, 1)
    both = OPERATOR.step_times_ns(batch_of(chunk, decode, decode))[0] * 1e-9
    without = OperatorCostModel(**{**TRUTH, "mixed_s": 0.0}).step_times_ns(batch_of(chunk, decode, decode))[0] * 1e-9
    assert both - without == pytest.approx(TRUTH["mixed_s"])
    assert OPERATOR.step_times_ns(batch_of(decode, decode)) == OperatorCostModel(
        **{**TRUTH, "mixed_s": 0.0}
    ).step_times_ns(batch_of(decode, decode))


def test_one_batch_of_two_costs_less_than_two_batches():
    together = OPERATOR.step_times_ns(batch_of((30, 1), (60, 1)))[0]
    apart = sum(OPERATOR.step_times_ns(batch_of(pair))[0] for pair in [(30, 1), (60, 1)])
    assert together < apart
    assert ARCH.step_times_ns(batch_of((30, 1), (60, 1)))[0] == pytest.approx(
        sum(ARCH.step_times_ns(batch_of(pair))[0] for pair in [(30, 1), (60, 1)]), abs=2
    )


def steps_of(seed, num_steps):
    rng = np.random.default_rng(seed)
    steps = [step((0, y)) for y in (1, 8, 64, 512)]
    while len(steps) < num_steps:
        size = int(rng.integers(1, 4))
        new = [1] * size if rng.random() < 0.4 else rng.integers(2, 160, size).tolist()
        new += [1] * int(rng.integers(0, 3))
        steps.append(step(*((int(rng.integers(0, 2)) * int(rng.integers(1, 900)), int(y)) for y in new)))
    return steps


def test_the_operator_fit_finds_the_parameters_that_made_the_steps():
    found = fit_operators(steps_of(0, 200), POINTS)
    assert np.abs(relative_errors(found, steps_of(1, 100))).max() < 1e-4
    assert found._terms == pytest.approx(OPERATOR._terms, rel=0.01)


def test_the_arch_level_surface_cannot_follow_what_the_operators_do():
    steps = steps_of(0, 200)
    surface = np.abs(relative_errors(fit_arch(steps), steps_of(1, 100))).mean()
    assert surface > 0.1 > 1e-4 > np.abs(relative_errors(fit_operators(steps, POINTS), steps_of(1, 100))).mean()


def test_a_fit_without_steps_near_a_point_is_refused():
    with pytest.raises(ValueError, match=r"tokens=\[2048, 4096\]: no measured step"):
        fit_operators(steps_of(0, 30), [*POINTS, 2048, 4096])


def test_no_parameter_of_a_fit_is_negative_and_none_is_worse_than_zero():
    rng = np.random.default_rng(2)
    a, wanted = rng.random((40, 6)), np.array([1.0, -2.0, 3.0, 0.0, 0.5, -0.1])
    b = a @ wanted
    found = nonnegative_least_squares(a, b)
    assert (found >= 0).all()
    gradient = a.T @ (b - a @ found)  # the conditions of Karush, Kuhn and Tucker
    assert (gradient <= 1e-8).all() and np.abs(gradient[found > 0]).max() < 1e-8
    assert nonnegative_least_squares(a, a @ np.abs(wanted)) == pytest.approx(np.abs(wanted), abs=1e-9)


def test_attention_costs_as_much_as_the_rest_where_the_curvature_says():
    costs = OperatorCostModel([1, 512], [0.001, 0.512], 1e-6, 0, 0, 0, 0, 0, 0, 0)
    assert attention_tokens(costs) == pytest.approx(1000, rel=0.01)  # 1 ms a token beside 1 us a pair
    assert attention_tokens(FIXED) == float("inf")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"causal_pair_s": -1.0}, "cost_model.causal_pair_s=-1.0"),
        ({"linear_s": [0.1, float("nan"), 0, 0]}, "cost_model.linear_s=nan"),
        ({"tokens": [1, 8, 8, 9]}, r"cost_model.tokens=\[1, 8, 8, 9\]: expected two or more rising"),
        ({"tokens": [1], "linear_s": [0.1]}, r"cost_model.tokens=\[1\]"),
    ],
)
def test_parameters_that_are_no_costs_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        OperatorCostModel(**{**TRUTH, **changes})
    with pytest.raises(ValueError, match=r"cost_model.surface=\[1\]: expected 6"):
        ArchCostModel([1])


@pytest.fixture
def write(tmp_path):
    """write(subject): the path of a file of that machine and model. operator: the arguments of that level."""

    def write_file(subject, operator=TRUTH):
        arch = {"surface": [0.01, 0, 1e-3, 0, 0, 0], "swap_block_s": 0.0}
        provenance = Provenance("2026-01-01", "tiny", "2", 16, 5, 1.0, {"operator": 2.0, "arch": 9.0})
        file = CostFile(subject, provenance, operator, arch, [step((0, 8))], [])
        path = tmp_path / "costs.json"
        path.write_bytes(msgspec.json.encode(file))
        return str(path)

    return write_file


def here(**changes):
    cfg = load_config(["exec=simulated"])
    return msgspec.structs.replace(subject_of(cfg, None), **changes)


def test_a_file_of_this_machine_is_the_model_that_was_fitted(write):
    path = write(here())
    cfg = load_config(["exec=simulated", "cost_model=fitted", f"cost_model.path={path}"])
    costs = build_cost_model(cfg, None)
    assert costs.exec_time_s(16, 40) == OPERATOR.exec_time_s(16, 40)
    assert costs.swap_time_s(3) == OPERATOR.swap_time_s(3)
    assert FittedCostModel(path, level="arch").exec_time_s(0, 10) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "words",
    [[f"cost_model={word}"] for word in ("fixed", "fitted", "h800_llama2_13b", "h800_llama2_13b_vllm", "roofline")],
)
def test_swaps_cost_as_much_for_each_token_whatever_the_size_of_blocks(words, write):
    path = [f"cost_model.path={write(here())}"] if words == ["cost_model=fitted"] else []
    words = ["exec=simulated", "tokens=workload", "geometry=llama3_8b", *words, *path]
    words += ["cost_model.swap_piece_s=0"] if not path else []
    costs = [build_cost_model(load_config([*words, f"kvcache.block_size={size}"]), None) for size in (1, 16, 64)]
    assert costs[1].swap_time_s(2) == costs[1].swap_block_s * 2 > 0
    for other, num_blocks in ((costs[0], 32), (costs[2], 0.5)):
        assert other.swap_time_s(num_blocks) == pytest.approx(costs[1].swap_time_s(2))


@pytest.mark.parametrize(("layout", "pieces"), [("discrete", 2 * 32), ("aggregated", 1)])
@pytest.mark.parametrize("word", ["fixed", "h800_llama2_13b", "roofline"])
def test_every_piece_of_a_swapped_block_has_its_price(word, layout, pieces):
    """Which is what the paper's huge pages save (section 5.2)."""
    words = ["exec=simulated", "tokens=workload", "geometry=llama3_8b", f"layout={layout}", f"cost_model={word}"]
    costs = build_cost_model(load_config([*words, "cost_model.swap_piece_s=1e-5"]), None)
    assert costs.swap_time_s(3) - 3 * costs.swap_block_s == pytest.approx(3 * pieces * 1e-5)
    with pytest.raises(ValueError, match="cost_model.swap_piece_s=-1"):
        build_cost_model(load_config([*words, "cost_model.swap_piece_s=-1"]), None)


def test_the_block_that_a_swap_s_price_is_of_can_be_another(write):
    words = ["exec=simulated", "kvcache.block_size=64", "cost_model.swap_block_s=0.5", "cost_model.swap_piece_s=0"]
    assert build_cost_model(load_config([*words, "cost_model.swap_block_tokens=64"]), None).swap_time_s(3) == 1.5
    with pytest.raises(ValueError, match="cost_model.swap_block_tokens=0: expected an integer >= 1"):
        build_cost_model(load_config([*words, "cost_model.swap_block_tokens=0"]), None)


@pytest.mark.parametrize(
    "changes", [{"machine": "abacus"}, {"cores": 900}, {"threads": 901}], ids=["machine", "cores", "threads"]
)
def test_a_file_of_another_machine_is_refused_unless_it_is_asked_for(write, changes):
    words = ["exec=simulated", "cost_model=fitted", f"cost_model.path={write(here(**changes))}"]
    [(name, value)] = changes.items()
    with pytest.raises(ConfigError, match=rf"{name}={value!r}: expected .*allow_other_machine=true"):
        build_cost_model(load_config(words), None)
    assert build_cost_model(load_config([*words, "cost_model.allow_other_machine=true"]), None)


SHAPE = {"num_layers": 3}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shape": {"num_layers": 4}}, "shape="),
        ({"dtype": "float16"}, "dtype='float16': expected 'float32'"),
        ({"attention": "sdpa"}, "attention='sdpa': expected 'sparse'"),
        ({"tensor_parallel": 2}, "tensor_parallel=2: expected 1"),
    ],
)
def test_a_file_of_another_model_is_refused_always(write, changes, named):
    runs = Subject("m", 2, 2, SHAPE, "float32", "sparse", 1)
    costs = FittedCostModel(write(msgspec.structs.replace(runs, **changes)), allow_other_machine=True)
    with pytest.raises(ValueError, match=named):
        costs.check(runs)
    costs.check(here())  # no model runs: the file alone says which one is meant


def test_a_real_model_is_compared_by_its_sizes(write):
    words = ["model=tiny", "step_time=model", "cost_model=fitted", f"cost_model.path={write(here(shape=SHAPE))}"]
    with pytest.raises(ConfigError, match="is of shape="):
        LocalCluster(load_config(words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["cost_model.path=/nowhere.json"], "cost_model.path=/nowhere.json: expected a file"),
        (["cost_model.level=guess", "cost_model.path=x"], "cost_model.level='guess': expected one of operator, arch"),
    ],
)
def test_a_file_that_is_not_there_is_refused_by_name(words, named):
    with pytest.raises(ConfigError, match=named):
        LocalCluster(load_config(["exec=simulated", "cost_model=fitted", *words]))


def test_a_file_that_is_something_else_is_refused_by_name(tmp_path):
    (tmp_path / "other.json").write_text('{"operator": 1}')
    with pytest.raises(ValueError, match="is no file of|not a file of"):
        FittedCostModel(str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match="cost_model.path: expected a value"):
        load_config(["cost_model=fitted"])


@pytest.mark.parametrize(
    ("operator", "named"),
    [
        ({**TRUTH, "mixed_s": -1.0}, "cost_model.mixed_s=-1.0: expected seconds in"),
        ({name: value for name, value in TRUTH.items() if name != "mixed_s"}, "missing .*'mixed_s'"),
        ({**TRUTH, "request_s": 1.0}, "unexpected .*'request_s'"),
    ],
    ids=["negative", "missing", "unknown"],
)
def test_a_file_with_costs_that_are_none_is_refused_by_its_name(write, operator, named):
    path = write(here(), operator)
    with pytest.raises(ValueError, match=rf"cost_model.path={path}: its operator-level costs .*{named}"):
        FittedCostModel(path)


@pytest.mark.parametrize("preset", ["h800_llama2_13b", "h800_llama2_13b_vllm"])
def test_the_published_presets_give_the_times_they_were_derived_from(preset):
    costs = build_cost_model(load_config([f"cost_model={preset}"]), None)
    assert costs.exec_time_s(0, 1794) == pytest.approx(0.067, rel=0.01)
    assert costs.exec_time_s(0, 128) == pytest.approx(0.011, rel=0.01)


@pytest.mark.parametrize("num_tokens", [300, 1794, 12_000, 100_000])
def test_a_prompt_is_no_dearer_for_what_is_cached_of_it(num_tokens):
    costs = build_cost_model(load_config(["cost_model=h800_llama2_13b"]), None)
    cached = np.arange(0, num_tokens, 16)
    seconds = costs.exec_time_s(cached, num_tokens - cached)
    assert (np.diff(seconds) <= 1e-12).all()
    assert costs.exec_time_s(1, num_tokens - 1) == pytest.approx(seconds[0], rel=1e-3)


def test_a_simulation_takes_as_long_as_the_operators_say():
    words = ["exec=simulated", "workload=synthetic", "workload.num_sessions=1", "workload.max_output_tokens=1"]
    report = LocalCluster(load_config([*words, "cost_model=h800_llama2_13b", "workload.prompt_tokens=512"])).run()
    costs = build_cost_model(load_config(["cost_model=h800_llama2_13b"]), None)
    assert report["ttft_s"]["mean"] == pytest.approx(costs.exec_time_s(0, 512), rel=0.3)
