"""ModelConfig agrees with transformers on what a config means, and refuses by name what the decoder cannot run."""

import math
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from memserve.model.model_config import ModelConfig
from memserve.model.rope_scaling import RopeScaling

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = [
    LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    MistralConfig(**SMALL, sliding_window=None, head_dim=16),
    Qwen2Config(**SMALL, tie_word_embeddings=True),
    Qwen3Config(**SMALL, head_dim=24),
]


def llama(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SMALL, **changes}


@pytest.mark.parametrize("hf", FAMILIES, ids=lambda c: c.model_type)
def test_shapes_and_switches_equal_those_of_transformers(hf: PreTrainedConfig) -> None:
    config = ModelConfig.from_hf(hf.to_dict())
    assert (config.hidden_size, config.num_layers, config.num_heads) == (32, 2, 4)
    assert config.head_dim == (getattr(hf, "head_dim", None) or 8)
    assert config.tie_embeddings == hf.tie_word_embeddings
    assert config.qk_norm == (hf.model_type == "qwen3")
    assert config.qkv_bias == (hf.model_type in ("llama", "qwen2"))
    assert config.o_bias == config.mlp_bias == (hf.model_type == "llama")


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = ModelConfig.from_hf(llama(rope_theta=5e5, rope_scaling=LLAMA3_ROPE))
    new = ModelConfig.from_hf(llama(rope_parameters={"rope_theta": 5e5, **LLAMA3_ROPE}))
    assert old == new
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    linear = ModelConfig.from_hf(llama(rope_scaling={"type": "linear", "factor": 2.0}))
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    assert ModelConfig.from_hf(llama(rope_parameters={"rope_type": "default"})).rope_scaling is None


def test_yarn_makes_the_context_longer_and_no_sliding_window_may_be_shorter_than_that():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert ModelConfig.from_hf(llama(rope_scaling=yarn, max_position_embeddings=100)).max_position == 400
    assert ModelConfig.from_hf(llama(rope_scaling=yarn, max_position_embeddings=500)).max_position == 500
    assert (
        ModelConfig.from_hf(llama(rope_scaling={"type": "yarn", "factor": 2}, max_position_embeddings=64)).max_position
        == 128
    )
    windowed = llama(rope_scaling=yarn, max_position_embeddings=100) | {"model_type": "mistral", "sliding_window": 200}
    with pytest.raises(ValueError, match="sliding_window=200: expected null, or at least the context, 400"):
        ModelConfig.from_hf(windowed)


def test_null_keys_take_the_values_that_the_family_gives_them() -> None:
    config = ModelConfig.from_hf(llama(num_key_value_heads=None, head_dim=None, rope_scaling=None))
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)
    assert ModelConfig.from_hf(llama(model_type="qwen2", num_key_value_heads=None)).num_kv_heads == 4


def test_end_tokens_come_from_the_generation_config_where_it_names_some() -> None:
    assert ModelConfig.from_hf(llama(eos_token_id=2)).eos_token_ids == (2,)
    assert ModelConfig.from_hf(llama(eos_token_id=2), {"eos_token_id": [7, 8, 7]}).eos_token_ids == (7, 8)
    assert ModelConfig.from_hf(llama(eos_token_id=2), {"bos_token_id": 1}).eos_token_ids == (2,)
    assert ModelConfig.from_hf(llama()).eos_token_ids == ()


def test_a_window_that_covers_the_whole_context_is_no_window() -> None:
    base = {"model_type": "mistral", **SMALL}
    assert ModelConfig.from_hf({**base, "sliding_window": 128}).max_position == 128
    qwen = {**base, "model_type": "qwen2", "sliding_window": 16}
    assert ModelConfig.from_hf(qwen).max_position == 128
    for no_layer in ({"max_window_layers": 2}, {"layer_types": ["full_attention"] * 2, "max_window_layers": 0}):
        assert ModelConfig.from_hf({**qwen, "use_sliding_window": True, **no_layer}).max_position == 128


def test_a_window_is_no_window_where_no_longer_context_is_to_be_run() -> None:
    mistral = {"model_type": "mistral", **SMALL, "sliding_window": 64}
    assert ModelConfig.from_hf(mistral, max_context=64).max_position == 64
    assert ModelConfig.from_hf({**mistral, "sliding_window": None}, max_context=64).max_position == 64
    assert ModelConfig.from_hf({**mistral, "sliding_window": None}, max_context=500).max_position == 128
    mixed = {**mistral, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    assert ModelConfig.from_hf(mixed, max_context=20).max_position == 20
    with pytest.raises(ValueError, match="sliding_window=64: .* the context, 65; or a max_context of at most 64"):
        ModelConfig.from_hf(mistral, max_context=65)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma3"}, "gemma3.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope.*default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' without factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor='4'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}}, "0 < beta_slow < beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": "1", "mscale_all_dim": 1}}, "mscale='1'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0}}, "attention_factor=0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, "truncate=1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 1}, "rope_theta=1: expected a number > 1"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "without low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window=64"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window=4096"),
        ({"model_type": "mistral", "sliding_window": 64, "use_sliding_window": False}, "sliding_window=64"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "=64"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters=.*rope_scaling=",
        ),
        ({"rope_parameters": "linear"}, "rope_parameters='linear'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
        ({"eos_token_id": 2.0}, "eos_token_id=2.0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["chunked_attention"] * 2, "sliding_window": 128}, "chunked_attention"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window='4096': expected null or an integer"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0: expected null or an integer >= 1"),
        ({"num_key_value_heads": 3}, "num_heads=4.*num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": "64"}, "vocab_size='64'"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"eos_token_id": [-1]}, "eos_token_id"),
        ({"model_type": ["llama"]}, "model_type=.*expected text"),
        ({"architectures": [1]}, "architectures=.*expected a list of names"),
        ({"layer_types": 3}, "layer_types=3: expected a list of names"),
        ({"quantization_config": "awq"}, "quantization_config='awq': expected a mapping"),
        ({"max_window_layers": "x"}, "max_window_layers='x': expected an integer"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>': expected an integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': expected true or false"),
        ({"attention_bias": 0}, "attention_bias=0: expected true or false"),
        ({"mlp_bias": "no"}, "mlp_bias='no': expected true or false"),
        ({"use_sliding_window": "true"}, "use_sliding_window='true': expected true or false"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "factor=inf: expected a finite number"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(llama(**changes))


def test_a_missing_key_is_named() -> None:
    config = llama()
    del config["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size"):
        ModelConfig.from_hf(config)
