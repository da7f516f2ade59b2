"""Small models whose sizes divide, and what is asked of them; the same for the ranks and for the test that judges them.

Together they have everything a decoder here may have: grouped queries, biases, norms of queries and keys, a tied and an
untied head, an odd number of heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mini_engine import MiniEngine
from small_models import SMALL, five_prompts

from memserve.model.llama import Llama, load_model
from memserve.model.model_config import ModelConfig
from memserve.model.parallel import WHOLE, Shard, WholeModel
from memserve.model.random_weights import RandomWeights
from memserve.model.safetensors_weights import SafetensorsWeights
from memserve.model.sampler import Sampler

NUM_OUTPUT = 6
_QWEN = replace(SMALL, vocab_size=104, num_heads=8, num_kv_heads=4, tie_embeddings=True)
RANDOM = {
    "qwen": _QWEN,
    "biases": replace(_QWEN, model_type="llama", qk_norm=False, tie_embeddings=False, o_bias=True, mlp_bias=True),
    "odd": replace(_QWEN, num_heads=9, num_kv_heads=3, vocab_size=99),
}
STORIES = ModelConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_layers=5,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position=512,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
)
WIDE = replace(RANDOM["biases"], num_layers=1, hidden_size=512, intermediate_size=16384, vocab_size=100)
EVERY = ("chunks", "steps", "cached", "mixed", "drawn")
SOME = ("chunks", "mixed")  # where the ranks are more than the cores a test may count on
CASES = {
    ("qwen", 2): EVERY,
    ("qwen", 4): SOME,
    ("biases", 2): EVERY,
    ("biases", 4): SOME,
    ("odd", 3): SOME,
    ("stories", 2): EVERY,
    ("stories", 4): SOME,
}


@dataclass
class Part(WholeModel):
    """A rank by itself: it loads its part, and there is nobody to compute with."""

    rank: int = 0
    size: int = 1


def model_of(name: str, stories: Path | None, shard: Shard = WHOLE, dtype: torch.dtype = torch.float32) -> Llama:
    """One of the models above; stories: the directory of stories260K."""
    if name == "stories":
        assert stories is not None
        return load_model(STORIES, SafetensorsWeights(stories), dtype, torch.device("cpu"), shard)
    return load_model(RANDOM[name], RandomWeights(RANDOM[name], seed=7), dtype, torch.device("cpu"), shard)


def engine_for(model: Llama, case: str, sampler: Sampler | None = None) -> MiniEngine:
    return MiniEngine(model, 4, "aggregated" if case == "chunks" else "discrete", scatter=True, sampler=sampler)


def answers(engine: MiniEngine, case: str) -> list[list[int]]:
    """The tokens of one way to compute the prompts. All ranks of a group call this, or their leader for all."""
    return _CASES[case](engine, five_prompts(engine.vocab_size))


def _chunks(engine: MiniEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    return engine.generate(prompts, NUM_OUTPUT, chunk=5)


def _steps(engine: MiniEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    return engine.generate(prompts, NUM_OUTPUT, num_steps=4)


def _cached(engine: MiniEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    first = engine.request(prompts[4], max_tokens=NUM_OUTPUT)
    engine.finish([first])
    again = [engine.request(prompts[4], cached_from=first, num_cached=n, max_tokens=NUM_OUTPUT) for n in (4, 48, 88)]
    return [first.output_token_ids.tolist(), *engine.finish(again)]


def _mixed(engine: MiniEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    early = [engine.request(p, max_tokens=NUM_OUTPUT) for p in prompts[:2]]
    engine.step(early, [1, 33])
    late = [engine.request(p, max_tokens=NUM_OUTPUT) for p in prompts[2:]]
    engine.step([late[0], early[0], late[2], early[1], late[1]], [20, 1, 50, 1, 7])
    return engine.finish(early + late)


def _drawn(engine: MiniEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    how = {"max_tokens": NUM_OUTPUT, "temperature": 1.0, "top_p": 0.9}
    return engine.finish([engine.request(p, seed=i, **how) for i, p in enumerate(prompts)], num_steps=3)


_CASES = {"chunks": _chunks, "steps": _steps, "cached": _cached, "mixed": _mixed, "drawn": _drawn}
