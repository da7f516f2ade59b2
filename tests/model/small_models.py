"""A decoder with grouped queries, biases and norms that runs in milliseconds, seeded models of it, and prompts."""

import numpy as np
import torch

from memserve.model.llama import Llama, load_model
from memserve.model.model_config import ModelConfig
from memserve.model.random_weights import RandomWeights

# Its head is not tied to its embeddings: a random model with a tied one repeats its last token, whatever it attends to.
SMALL = ModelConfig(
    model_type="qwen3",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position=512,
    qkv_bias=True,
    qk_norm=True,
)


def random_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Llama:
    return load_model(config, RandomWeights(config, seed), dtype, torch.device("cpu"))


def five_prompts(vocab_size: int) -> list[list[int]]:
    """Of 1, 33, 64, 7 and 90 tokens: less than a block, whole blocks of every size in use, and parts of one over."""
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab_size, n).tolist() for n in (1, 33, 64, 7, 90)]
