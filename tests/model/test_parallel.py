"""Tensor parallelism: a model split over 2, 3 and 4 real processes computes what it does on one, and nothing twice."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import parallel_ranks
import pytest
import torch
from child_process import own_environment, run_child
from mini_engine import RecordingSampler
from parallel_models import CASES, RANDOM, WIDE, Part, answers, engine_for, model_of
from ranks import launch
from safetensors.torch import save_file
from small_models import five_prompts

from memserve.model.llama import Llama, load_model
from memserve.model.near_ties import find_divergence
from memserve.model.parallel import WHOLE, check_divides
from memserve.model.random_weights import RandomWeights
from memserve.model.runner import geometry
from memserve.model.safetensors_weights import SafetensorsWeights
from memserve.model.sampler import Sampler

CPU = torch.device("cpu")
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
RUNS = [(name, size, case) for (name, size), cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Where the ranks of one launch left what they computed."""
    directory = tmp_path_factory.mktemp("ranks")
    ended = launch(parallel_ranks.main, 4, directory, STORIES if STORIES.is_dir() else None)
    assert [e.returncode for e in ended] == [0] * 4, "\n".join(e.output for e in ended)
    return directory


@pytest.fixture(scope="module")
def run(request, results, whole_runs):
    """(what each rank got, what one rank alone gets) of a case."""

    def of(name: str, size: int, case: str) -> tuple[list[dict], dict]:
        if name == "stories":
            request.getfixturevalue("stories260k")
        parts = [torch.load(results / f"{name}-{size}-{rank}.pt")[case] for rank in range(size)]
        return parts, whole_runs(name, case)

    return of


@pytest.fixture(scope="module")
def whole_runs():
    kept: dict[tuple[str, str], dict] = {}

    def of(name: str, case: str) -> dict:
        if (name, case) not in kept:
            sampler = RecordingSampler()
            engine = engine_for(model_of(name, STORIES), case, sampler)
            tokens = answers(engine, case)
            kept[name, case] = {"tokens": tokens, "logits": sampler.logits, "kv": engine.kv.contiguous()}
        return kept[name, case]

    return of


LEAVES = """
import os, sys, torch, torch.distributed as dist
from memserve.model.parallel import default_group

def threads():
    return [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with default_group() as kept:
    kept.broadcast(torch.zeros(3))
    assert any("gloo" in name for name in threads())
print(sum("gloo" in name for name in threads()), dist.is_initialized(), kept.size)
"""


def test_a_group_s_threads_have_ended_when_it_is_left_though_a_model_still_knows_its_rank() -> None:
    assert run_child(["-c", LEAVES]).split() == ["0", "False", "1"]


@pytest.mark.parametrize(("name", "size", "case"), RUNS)
def test_a_split_model_gives_the_tokens_of_the_whole_one(run, name, size, case) -> None:
    parts, whole = run(name, size, case)
    judge = model_of(name, STORIES, dtype=torch.float64)
    prompts = five_prompts(judge.config.vocab_size)
    prompts = [prompts[4]] * 4 if case == "cached" else prompts
    for prompt, got, expected in zip(prompts, parts[0]["tokens"], whole["tokens"], strict=True):
        divergence = find_divergence(judge, prompt, got, expected)
        assert divergence is None or divergence.is_near_tie, divergence


@pytest.mark.parametrize(("name", "size", "case"), RUNS)
def test_logits_and_kv_of_the_ranks_beside_each_other_are_those_of_the_whole_model(run, name, size, case) -> None:
    parts, whole = run(name, size, case)
    assert parts[0]["tokens"] == whole["tokens"], "a near tie: what follows cannot be compared"
    for got, expected in zip(parts[0]["logits"], whole["logits"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    kv = torch.cat([part["kv"] for part in parts], dim=4)
    torch.testing.assert_close(kv, whole["kv"], atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_followers_have_the_leaders_tokens_and_sample_nothing_themselves(run, name, size) -> None:
    for case in CASES[name, size]:
        parts, _ = run(name, size, case)
        assert all(part["tokens"] == parts[0]["tokens"] and not part["logits"] for part in parts[1:])


@pytest.mark.parametrize(("name", "size"), [("qwen", 2), ("qwen", 4), ("biases", 2), ("odd", 3)])
@pytest.mark.parametrize("source", ["random", "safetensors"])
def test_each_rank_holds_the_values_it_would_hold_of_the_whole_model(tmp_path, name, size, source) -> None:
    config = RANDOM[name]
    weights = RandomWeights(config, seed=3)
    if source == "safetensors":
        save_file({n: weights.tensor(n) for n in weights.names()}, tmp_path / "model.safetensors")
        weights = SafetensorsWeights(tmp_path)
    whole = load_model(config, weights, torch.float32, CPU)
    for rank in range(size):
        part = load_model(config, weights, torch.float32, CPU, Part(rank, size))
        assert_is_part_of(whole, part, rank, size)


def assert_is_part_of(whole: Llama, part: Llama, rank: int, size: int) -> None:
    def rows(stacked: torch.Tensor, *lengths: int) -> torch.Tensor:
        return torch.cat([piece.chunk(size)[rank] for piece in stacked.split(lengths)])

    c = whole.config
    heads = (c.num_heads * c.head_dim, *[c.num_kv_heads * c.head_dim] * 2)
    for mine, all_of_it in zip(part.layers, whole.layers, strict=True):
        for name, lengths in (("attention.qkv", heads), ("mlp.gate_up", [c.intermediate_size] * 2)):
            linear, expected = mine.get_submodule(name), all_of_it.get_submodule(name)
            assert torch.equal(linear.weight, rows(expected.weight, *lengths))
            assert expected.bias is None or torch.equal(linear.bias, rows(expected.bias, *lengths))
        for name in ("attention.o", "mlp.down"):
            linear, expected = mine.get_submodule(name), all_of_it.get_submodule(name)
            assert torch.equal(linear.weight, expected.weight.chunk(size, 1)[rank])
            assert (linear.bias is None) == (expected.bias is None or rank > 0)
    assert torch.equal(part.head.weight, whole.head.weight.chunk(size)[rank])
    assert torch.equal(part.embedding_VE, whole.embedding_VE)


def test_a_tied_head_is_a_view_of_the_embedding() -> None:
    part = load_model(RANDOM["qwen"], RandomWeights(RANDOM["qwen"]), torch.float32, CPU, Part(1, 2))
    assert part.head.weight.untyped_storage().data_ptr() == part.embedding_VE.untyped_storage().data_ptr()


def test_each_ranks_pool_holds_its_kv_heads() -> None:
    config = RANDOM["odd"]
    part = load_model(config, RandomWeights(config), torch.float32, CPU, Part(2, 3))
    g, whole = (geometry(c, 16, torch.float32) for c in (part.config, config))
    assert (g.num_kv_heads, whole.num_kv_heads) == (1, 3) and g.block_bytes * 3 == whole.block_bytes


class Untouchable(RandomWeights):
    """Weights that nobody may read."""

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 3, "num_kv_heads=4 does not divide by 3, expected one of 1, 2, 4"),
        ({}, 8, "num_kv_heads=4 does not divide by 8"),
        ({"num_kv_heads": 8, "intermediate_size": 76}, 8, "intermediate_size=76 does not divide by 8, .* 1, 2, 4"),
        ({"vocab_size": 103}, 2, "vocab_size=103 does not divide by 2, expected one of 1"),
        ({}, 0, "tensor parallelism of 0 ranks: expected an integer >= 1"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_before_any_tensor_is_read(change, size, message) -> None:
    config = replace(RANDOM["qwen"], **change)
    with pytest.raises(ValueError, match=message):
        check_divides(config, size)
    with pytest.raises(ValueError, match=message):
        load_model(config, Untouchable(config), torch.float32, CPU, Part(0, size))


def test_a_split_model_is_not_compiled() -> None:
    config = RANDOM["qwen"]
    part = load_model(config, RandomWeights(config), torch.float32, CPU, Part(1, 2))
    with pytest.raises(ValueError, match="model.compile=true: contradicts a model split over 2 ranks"):
        part.compile()


def test_weights_of_another_shape_than_the_config_says_are_refused_by_their_whole_shape() -> None:
    config = RANDOM["qwen"]
    narrower = RandomWeights(replace(config, intermediate_size=36))
    with pytest.raises(
        ValueError, match=r"gate_proj.weight: shape \(36, 48\) in the weights, \(72, 48\) by the config"
    ):
        load_model(config, narrower, torch.float32, CPU, Part(0, 2))


def test_a_rank_alone_does_nothing_more_than_before() -> None:
    tensor, sampler = torch.ones(2, 3), Sampler()
    assert WHOLE.sum(tensor) is tensor and WHOLE.gather(tensor) is tensor and WHOLE.sampler(sampler) is sampler


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status, which only Linux has")
def test_a_rank_never_holds_a_whole_tensor_that_it_shards(tmp_path) -> None:
    """A quarter of three 32 MiB tensors is loaded where memory is left for 2 MiB more; of rows, only those are read."""
    weights = RandomWeights(WIDE)
    save_file({n: weights.tensor(n) for n in weights.names()}, tmp_path / "model.safetensors")
    program = Path(__file__).with_name("limited_memory.py")
    command = [sys.executable, str(program), str(tmp_path), "2", "4"]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    num_bytes, whole = done.stdout.splitlines()
    assert whole == "no room for a whole one"
    quarter_bytes = 2 * WIDE.intermediate_size // 4 * WIDE.hidden_size * 4
    assert quarter_bytes <= int(num_bytes) < 2 * quarter_bytes  # pages around those that are read come with them
