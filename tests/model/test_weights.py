"""Tensor names equal transformers', random weights are a function of (seed, name), safetensors files are checked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from memserve.model.model_config import ModelConfig
from memserve.model.random_weights import RandomWeights
from memserve.model.safetensors_weights import SafetensorsWeights
from memserve.model.weights import WeightFileError, tensor_shapes

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
CONFIGS = [
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=16),
]
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.float16), "c": torch.ones(5)}


def small_config() -> ModelConfig:
    return ModelConfig.from_hf(LlamaConfig(**SIZES).to_dict())


@pytest.mark.parametrize("hf", CONFIGS, ids=["llama-tied", "llama-biases", "qwen2", "qwen3"])
def test_the_tensors_we_expect_are_those_of_transformers(hf: PreTrainedConfig) -> None:
    state = AutoModelForCausalLM.from_config(hf).state_dict()
    if hf.tie_word_embeddings:
        del state["lm_head.weight"]
    assert tensor_shapes(ModelConfig.from_hf(hf.to_dict())) == {k: tuple(v.shape) for k, v in state.items()}


def test_a_random_tensor_depends_on_seed_and_name_and_not_on_the_order_of_reading() -> None:
    a, b = RandomWeights(small_config(), seed=3), RandomWeights(small_config(), seed=3)
    forwards = {name: a.tensor(name) for name in sorted(a.names())}
    backwards = {name: b.tensor(name) for name in sorted(b.names(), reverse=True)}
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(forwards[up], forwards[down])
    assert not torch.equal(forwards[up], RandomWeights(small_config(), seed=4).tensor(up))


def test_random_weights_have_the_dtype_that_was_asked_for() -> None:
    weights = RandomWeights(small_config(), dtype=torch.bfloat16)
    assert {weights.tensor(name).dtype for name in weights.names()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="seed=-1"):
        RandomWeights(small_config(), seed=-1)


def test_a_single_file_and_its_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    write_single(single)
    write_shards(sharded)
    for directory in (single, sharded):
        weights = SafetensorsWeights(directory)
        assert weights.names() == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert weights.tensor(name).dtype == tensor.dtype
            assert torch.equal(weights.tensor(name), tensor) and weights.shape(name) == tuple(tensor.shape)


def test_a_tensor_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    write_single(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    assert weights.tensor("a").data_ptr() == weights.tensor("a").data_ptr()
    with pytest.raises(KeyError):
        weights.tensor("d")


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    write_single(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightFileError, match="model.safetensors: truncated or corrupt"):
        SafetensorsWeights(tmp_path)


def test_missing_shards_and_tensors_that_are_not_in_their_shard_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").rename(tmp_path / "kept")
    with pytest.raises(WeightFileError, match=r"1 of 2 shards are missing: .*model-2.safetensors"):
        SafetensorsWeights(tmp_path)
    save_file({"b": TENSORS["b"]}, tmp_path / "model-2.safetensors")
    with pytest.raises(WeightFileError, match=r"model-2.safetensors: has no tensor 'c'"):
        SafetensorsWeights(tmp_path)


def test_a_directory_without_weights_says_what_it_has_instead(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"neither model.safetensors nor"):
        SafetensorsWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightFileError, match="pytorch_model.bin: pickled weights are not read"):
        SafetensorsWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightFileError, match="weight_map"):
        SafetensorsWeights(tmp_path)


def write_single(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    save_file(TENSORS, directory / "model.safetensors")


def write_shards(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    shards = {"model-1.safetensors": ["a"], "model-2.safetensors": ["b", "c"]}
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
