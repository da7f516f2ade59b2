"""Rotary embedding against transformers' own frequencies, and its defining property."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from memserve.model.model_config import ModelConfig
from memserve.model.rope import RotaryEmbedding, rotate

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, all of it said": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, its magnitude given": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 1.5,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.8,
        "beta_fast": None,
    },
    "yarn of a model's own length": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
}


def hf_config(kind: str, head_dim: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=head_dim, rope_parameters=dict(SCALINGS[kind]))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotation_equals_transformers(kind: str, head_dim: int) -> None:
    hf = hf_config(kind, head_dim)
    positions = torch.tensor([0, 1, 7, 500, 2047, 100_000])
    q = torch.randn(len(positions), 3, head_dim)
    cos, sin = LlamaRotaryEmbedding(hf)(q, positions[None])
    expected, _ = apply_rotary_pos_emb(q[None].transpose(1, 2), q[None].transpose(1, 2), cos, sin)
    rotary = RotaryEmbedding(ModelConfig.from_hf(hf.to_dict()), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(
        rotate(q, *rotary.rotation(positions)), expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5
    )


def test_a_product_of_rotated_vectors_depends_on_their_distance_alone() -> None:
    config = ModelConfig.from_hf(hf_config("default", 64).to_dict())
    rotary = RotaryEmbedding(config, torch.float64, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        turned = [rotate(x, *rotary.rotation(torch.tensor([p]))) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
