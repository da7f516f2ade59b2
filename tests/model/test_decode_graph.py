"""DecodeGraph: the compiled decode step gives the tokens of the eager one, or refuses by name."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from mini_engine import MiniEngine
from small_models import SMALL, random_model

from memserve.model.decode_graph import MAX_REQUESTS, WeightsInCacheKey
from memserve.model.llama import Llama

NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="torch.compile finds no C++ compiler: install g++ or clang++")
CONFIG = replace(
    SMALL, num_layers=1, intermediate_size=96, vocab_size=192
)  # products of three shapes: of five it takes longer
NUM_OUTPUT = 8


def model(seed: int, dtype: torch.dtype = torch.float32) -> Llama:
    return random_model(CONFIG, seed, dtype)


def prompts(num: int) -> list[list[int]]:
    rng = np.random.default_rng(num)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in rng.integers(1, 40, num)]


@needs_compiler
@pytest.mark.filterwarnings("default")  # torch warns of its own parts while it compiles
@pytest.mark.timeout(600)
def test_compiled_tokens_equal_eager_ones_over_a_cache_full_of_nan() -> None:
    eager, compiled = model(0), model(0)
    compiled.compile()
    for num, num_steps in ((5, 1), (1, 1), (3, 4), (MAX_REQUESTS + 1, 3)):
        engines = [MiniEngine(m, 4, num_blocks=1200, scatter=True) for m in (eager, compiled)]
        expected, actual = (e.generate(prompts(num), NUM_OUTPUT, num_steps=num_steps) for e in engines)
        assert actual == expected
        written = ~engines[0].kv.isnan()
        torch.testing.assert_close(engines[1].kv[written], engines[0].kv[written], atol=1e-4, rtol=1e-4)
    assert compiled.decode_graph is not None and compiled.decode_graph.compile_s > 0


def test_models_of_one_shape_are_told_apart_in_the_cache_on_disk() -> None:
    keys = [WeightsInCacheKey(model(seed).state_dict()).uuid() for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_compile_without_a_compiler_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.compile=true: needs a C\+\+ compiler"):
        model(0).compile()


def test_compile_refuses_what_it_is_not_made_for(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu: expected torch\.float32 on a cpu"):
        model(0, torch.bfloat16).compile()
