"""Llama and its loader against transformers, on seeded random models of odd sizes and on a small trained one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from mini_engine import DictWeights, MiniEngine, logits_of, model_of

from memserve.model.llama import load_model
from memserve.model.model_config import ModelConfig

COMMON = {"vocab_size": 199, "num_hidden_layers": 3, "max_position_embeddings": 512, "initializer_range": 0.1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def sizes(hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return dict(zip(names, (hidden, mlp, heads, kv_heads, head_dim), strict=True))


CONFIGS = {
    "llama_gqa3_untied": transformers.LlamaConfig(**COMMON, **sizes(96, 130, 6, 2, 64)),
    "llama_biases_tied": transformers.LlamaConfig(
        **COMMON, **sizes(90, 101, 3, 3, 80), attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3_rope": transformers.LlamaConfig(**COMMON, **sizes(64, 96, 4, 1, 64), rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": transformers.LlamaConfig(
        **COMMON, **sizes(64, 96, 4, 4, 16), rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
    ),
    "qwen2": transformers.Qwen2Config(
        **COMMON, **{k: v for k, v in sizes(240, 144, 3, 1, 80).items() if k != "head_dim"}
    ),
    "qwen3": transformers.Qwen3Config(**COMMON, **sizes(104, 160, 6, 2, 128)),
    "qwen3_yarn": transformers.Qwen3Config(
        **COMMON,
        **sizes(104, 160, 6, 2, 32),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral": transformers.MistralConfig(**COMMON, **sizes(72, 88, 6, 2, 80), sliding_window=None),
}


def hf_model(name: str) -> torch.nn.Module:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: give them something to say
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompts(seed: int, lengths: tuple[int, ...], vocab_size: int = 199) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, n).tolist() for n in lengths]


def hf_greedy(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_transformers(name: str) -> None:
    hf, batch = hf_model(name), prompts(1, (1, 37, 70, 16))
    hf.generation_config.eos_token_id = None
    ours = model_of(hf)
    with torch.inference_mode():
        expected = hf(torch.tensor([batch[2]])).logits[0, 6::7]
    torch.testing.assert_close(logits_of(ours, batch[2], chunk=7), expected, atol=1e-4, rtol=1e-4)
    assert MiniEngine(ours).generate(batch, 24) == [hf_greedy(hf, p, 24) for p in batch]


def test_contexts_up_to_a_sliding_window_equal_those_of_transformers_which_has_it() -> None:
    torch.manual_seed(7)
    shape = transformers.MistralConfig(**COMMON, **sizes(72, 88, 6, 2, 80), sliding_window=48)
    hf, batch = transformers.AutoModelForCausalLM.from_config(shape).eval(), prompts(5, (1, 30, 47))
    hf.generation_config.eos_token_id = None
    config = ModelConfig.from_hf(hf.config.to_dict(), max_context=48)
    ours = load_model(config, DictWeights(hf.state_dict()), torch.float32, torch.device("cpu"))
    for prompt in batch:
        num_new = 49 - len(prompt)  # the last token is generated, and never read
        assert MiniEngine(ours).generate([prompt], num_new) == [hf_greedy(hf, prompt, num_new)]


@pytest.mark.parametrize("name", ["llama3_rope", "qwen3"])
def test_float64_with_the_reference_backend_equals_transformers_in_float64(name: str) -> None:
    hf, (prompt,) = hf_model(name), prompts(2, (150,))
    ours = model_of(hf, torch.float64)
    with torch.inference_mode():
        expected = hf.double()(torch.tensor([prompt])).logits[0, 49::50]
    torch.testing.assert_close(logits_of(ours, prompt, "reference", chunk=50), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_close_to_float32(dtype: torch.dtype) -> None:
    hf, (prompt,) = hf_model("qwen3"), prompts(3, (40,))
    exact, rounded = (logits_of(model_of(hf, d), prompt, chunk=20) for d in (torch.float32, dtype))
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_small_trained_model_tells_the_same_story_as_transformers(stories260k: Path) -> None:
    hf = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None
    batch = prompts(4, (1, 20, 65), hf.config.vocab_size)
    assert MiniEngine(model_of(hf)).generate(batch, 64) == [hf_greedy(hf, p, 64) for p in batch]


def small() -> tuple[ModelConfig, DictWeights]:
    hf = hf_model("llama_gqa3_untied")
    return ModelConfig.from_hf(hf.config.to_dict()), DictWeights(dict(hf.state_dict()))


def load(config: ModelConfig, source: DictWeights) -> None:
    load_model(config, source, torch.float32, torch.device("cpu"))


def test_a_tied_pair_may_be_stored_under_the_heads_name_alone() -> None:
    hf = hf_model("llama_biases_tied")
    config, tensors = ModelConfig.from_hf(hf.config.to_dict()), dict(hf.state_dict())
    tensors.pop("model.embed_tokens.weight")
    model = load_model(config, DictWeights(tensors), torch.float32, torch.device("cpu"))
    assert torch.equal(model.embedding_VE, tensors["lm_head.weight"])
    assert model.head.weight.data_ptr() == model.embedding_VE.data_ptr()
    config = replace(config, tie_embeddings=False)
    with pytest.raises(ValueError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        load(config, DictWeights(tensors))


def test_a_missing_tensor_is_named() -> None:
    config, source = small()
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight', which"):
        load(config, source)
    del source.tensors["model.norm.weight"], source.tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight' and 2 more, which"):
        load(config, source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 4}, r"no tensor 'model\.layers\.3\.input_layernorm\.weight' and 8 more"),
        ({"num_layers": 2}, r"9 tensors the model has no place for: model\.layers\.2\."),
        ({"vocab_size": 2**50}, r"shape \(199, 96\) in the weights, \(1125899906842624, 96\) by the config"),
    ],
)
def test_weights_that_are_not_the_config_s_are_refused_before_one_is_read_or_memory_is_taken(changes, said) -> None:
    config, source = small()
    source.tensor = lambda name: pytest.fail(f"{name} was read")
    with pytest.raises(ValueError, match=said):
        load(replace(config, **changes), source)


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    config, source = small()
    source.tensors["model.norm.weight"] = torch.zeros(97)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: shape \(97,\).*\(96,\)"):
        load(config, source)


def test_a_tensor_without_a_place_is_refused_not_dropped() -> None:
    config, source = small()
    source.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(384)
    with pytest.raises(ValueError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(config, source)


def test_loading_copies_so_that_the_source_may_go_away() -> None:
    config, source = small()
    model = load_model(config, source, torch.float32, torch.device("cpu"))
    before = model.layers[0].mlp.down.weight.clone()
    source.tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    assert torch.equal(model.layers[0].mlp.down.weight, before)
