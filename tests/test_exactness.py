"""Greedy float32 tokens of the whole stack equal those of transformers on the same weights, 64 tokens each."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.initialization import no_init_weights
from weights_once import weights_loaded_once

from memserve import LLM, SamplingParams, llm
from memserve.model.llama import load_model
from memserve.model.model_path import open_model
from memserve.model.near_ties import find_divergence

NUM_TOKENS = 64
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


WARM = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def one_llama():
    """Every case with the same model has the same Llama object; pools and schedulers are its own."""
    with weights_loaded_once(llm):
        yield


def hf_answers(model, prompts):
    """All prompts in one batch, padded on the left."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    out = model.generate(
        torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, longest:].tolist()


@functools.cache
def float64_model(path):
    opened = open_model(path)
    return load_model(opened.config, opened.weights, torch.float64, torch.device("cpu"))


def assert_same_tokens(path, prompts, ours, theirs):
    """Equal, or parting only where the float64 logits of the two tokens almost coincide."""
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        assert len(a) == len(b) == NUM_TOKENS
        divergence = find_divergence(float64_model(path), prompt, a, b) if a != b else None
        if divergence is not None:
            print(f"near tie: {divergence}")
            assert divergence.is_near_tie, divergence


def served(path, prompts, is_warm=False, **options):
    """The answers, and the LLM that gave them. is_warm: the prompts were served before; with an index, cached then."""
    engine = LLM(path, num_blocks=options.pop("num_blocks", 400), **options)
    if is_warm and options.get("index") != "none":
        engine.generate(prompts, WARM)
    outputs = engine.generate(prompts, PARAMS)
    engine.instance.check()
    if is_warm and options.get("index") != "none" and options["block_size"] <= 16:
        assert all(o.num_cached > 0 for o in outputs if len(o.prompt_token_ids) > options["block_size"])
    return [o.token_ids for o in outputs], engine


def answers(path, prompts, is_warm=False, **options):
    return served(path, prompts, is_warm, **options)[0]


# Every pair of values of two options occurs in some row (an orthogonal array of strength two).
COLUMNS = ("index", "block_size", "chunk_size", "layout", "attention", "max_running", "num_blocks")
PAIRWISE = [
    ("radix", 1, None, "discrete", "sdpa", 1, 400),
    ("radix", 4, 16, "aggregated", "reference", 8, 60),
    ("radix", 16, 7, "discrete", "reference", 8, 14),
    ("radix", 32, None, "aggregated", "sdpa", 1, 7),
    ("none", 1, 16, "aggregated", "reference", 1, 300),
    ("radix", 16, 16, "aggregated", "sparse", 8, 20),
    ("none", 4, 7, "discrete", "sparse", 8, 200),
    ("none", 4, 7, "discrete", "sdpa", 8, 50),
    ("none", 16, None, "aggregated", "sdpa", 8, 400),
    ("none", 32, 16, "discrete", "reference", 1, 400),
    ("radix", 1, 7, "aggregated", "sdpa", 8, 200),
    ("none", 4, None, "discrete", "reference", 1, 400),
    ("radix", 16, 16, "discrete", "sdpa", 1, 400),
    ("none", 32, 7, "aggregated", "reference", 8, 6),
]

# Pools so small that requests preempt each other and cached blocks move; with the two small models.
TIERED = {
    "preempted by swapping": {
        "preemption": "swap", "swap": "always", "eviction": "lru", "layout": "discrete", "attention": "sdpa",
        "block_size": 4, "num_blocks": 34, "num_dram_blocks": 60, "chunk_size": 16, "batching": "prefill_first",
    },
    "preempted by swapping, large blocks, never swapped in": {
        "preemption": "swap", "swap": "never", "eviction": "lfu", "layout": "aggregated", "attention": "sparse",
        "block_size": 16, "num_blocks": 9, "num_dram_blocks": 12,
    },
    "preempted by recomputing, swapped in": {
        "preemption": "recompute", "swap": "always", "eviction": "cost_aware", "layout": "aggregated",
        "attention": "reference", "block_size": 4, "num_blocks": 34, "num_dram_blocks": 200,
    },
    "preempted by swapping, copied beside compute": {
        "preemption": "swap", "swap": "always", "eviction": "lru", "layout": "discrete", "attention": "sdpa",
        "block_size": 4, "num_blocks": 34, "num_dram_blocks": 200, "async_swap": True, "swap_ahead_blocks": 4,
    },
    "preempted by recomputing, a small DRAM": {
        "preemption": "recompute", "swap": "always", "eviction": "fifo", "layout": "discrete", "attention": "sdpa",
        "block_size": 5, "num_blocks": 27, "num_dram_blocks": 7, "chunk_size": 7, "batching": "prefill_first",
    },
}  # fmt: skip


def shared_prompts(vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    stem = rng.integers(3, vocab_size, 40).tolist()
    lengths = [(40, 9), (40, 1), (17, 30), (0, 5), (33, 0)]
    return [stem[:n] + rng.integers(3, vocab_size, m).tolist() for n, m in lengths]


def save(model, path: Path):
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval().save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=211, hidden_size=96, intermediate_size=144, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=300, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    model = save(transformers.LlamaForCausalLM(config), path)
    prompts = shared_prompts(211)
    return str(path), prompts, hf_answers(model, prompts)


@pytest.fixture(scope="module")
def stories(stories260k):
    path = str(stories260k)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = open_model(path).tokenizer
    texts = ["Once upon a time", "Once upon a time, there was a little", "One day, Tom and his dog", "The"]
    prompts = [tokenizer.encode(text).tolist() for text in texts]
    return path, prompts, hf_answers(model, prompts)


@pytest.mark.parametrize("row", PAIRWISE, ids=lambda row: "-".join(map(str, row)))
def test_a_random_llama_answers_as_transformers_does(random_llama, row):
    path, prompts, expected = random_llama
    options = dict(zip(COLUMNS, row, strict=True))
    assert_same_tokens(path, prompts, answers(path, prompts, is_warm=True, **options), expected)


@pytest.mark.parametrize("row", PAIRWISE[::2], ids=lambda row: "-".join(map(str, row)))
def test_a_small_trained_model_answers_as_transformers_does(stories, row):
    path, prompts, expected = stories
    options = dict(zip(COLUMNS, row, strict=True))
    assert_same_tokens(path, prompts, answers(path, prompts, is_warm=True, **options), expected)


@pytest.mark.parametrize("name", TIERED)
@pytest.mark.parametrize("model", ["random_llama", "stories"])
def test_requests_that_preempt_and_swap_are_answered_as_by_transformers(request, model, name):
    path, prompts, expected = request.getfixturevalue(model)
    ours, engine = served(path, prompts, is_warm=True, **TIERED[name])
    assert_same_tokens(path, prompts, ours, expected)
    assert engine.instance.scheduler.counts.preemptions > 0 and engine.instance.pool.stats().num_swapped_out > 0


ODD_CONFIGS = {
    "qwen2": transformers.Qwen2Config(
        vocab_size=173, hidden_size=240, intermediate_size=190, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=300, initializer_range=0.1, tie_word_embeddings=True,
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=173, hidden_size=104, intermediate_size=190, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=300, initializer_range=0.1,
    ),
    "llama-untied-head-dim-80": transformers.LlamaConfig(
        vocab_size=173, hidden_size=72, intermediate_size=101, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=80, max_position_embeddings=300, initializer_range=0.1,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_CONFIGS)
@pytest.mark.parametrize("block_size", [5, 16])
def test_odd_shapes_of_every_family_answer_as_transformers_does(name, block_size, tmp_path):
    torch.manual_seed(3)
    model = save(transformers.AutoModelForCausalLM.from_config(ODD_CONFIGS[name]), tmp_path)
    prompts = shared_prompts(173, seed=2)
    ours = answers(str(tmp_path), prompts, is_warm=True, block_size=block_size, chunk_size=11)
    assert_same_tokens(str(tmp_path), prompts, ours, hf_answers(model, prompts))


SMOLLM2 = {
    "served from the cache, one token a block": {
        "block_size": 1, "num_blocks": 1200, "is_warm": True, "attention": "sparse",
    },
    "swapped in from DRAM": {
        "block_size": 32, "layout": "aggregated", "num_blocks": 5, "num_dram_blocks": 8, "is_warm": True,
        "async_swap": True,
    },
    "preempted to DRAM": {
        "block_size": 4, "num_blocks": 50, "num_dram_blocks": 30, "chunk_size": 32, "preemption": "swap",
    },
    "one after the other, without caching, small chunks": {
        "block_size": 16, "max_running": 1, "index": "none", "chunk_size": 16, "attention": "reference",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    opened = open_model(smollm2_path)
    c = opened.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, max_position_embeddings=c.max_position, rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=c.tie_embeddings,
    )  # fmt: skip
    with no_init_weights():
        model = transformers.LlamaForCausalLM(config)
    state = {name: opened.weights.tensor(name).float() for name in opened.weights.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    tokenizer = opened.tokenizer
    chats = ["What is the capital of France?", "Tell me a story about a fox."]
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": text}]).tolist() for text in chats]
    return smollm2_path, prompts, hf_answers(model.eval(), prompts)


@pytest.mark.timeout(400)  # 135M parameters on a core that may be shared
@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2_answers_as_transformers_does(smollm2, name):
    path, prompts, expected = smollm2
    ours, engine = served(path, prompts, **SMOLLM2[name])
    assert_same_tokens(path, prompts, ours, expected)
    assert engine.instance.pool.stats().num_swapped_out > 0 or "DRAM" not in name
    assert engine.instance.scheduler.counts.preemptions > 0 or "preempted" not in name
