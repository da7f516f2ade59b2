"""SIGINT in the midst of a step, as a notebook's Ctrl-C: it ends one `generate`, and costs the LLM nothing else."""

import json
import signal

import pytest

from memserve import LLM, SamplingParams

CONFIG = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 200,
}  # fmt: skip
PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
MOMENTS = (("before", "pool.allocator.evicted"), ("after", "scheduler.commit"), ("after", "drain_outbox"))


@pytest.fixture
def llm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return LLM(f"random:{tmp_path}", block_size=4, num_blocks=24)


def interrupt_once(monkeypatch, instance, when, named):
    """SIGINT comes right before or after the next call of a method of the instance, or of a part of it."""
    *parts, name = named.split(".")
    owner, to_come = instance, [when]
    for part in parts:
        owner = getattr(owner, part)
    method = getattr(owner, name)

    def interrupted(*args, **options):
        if to_come == ["before"]:
            to_come.clear()
            signal.raise_signal(signal.SIGINT)
        result = method(*args, **options)
        if to_come == ["after"]:
            to_come.clear()
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(("when", "named"), MOMENTS)
def test_sigint_in_the_midst_of_a_step_ends_one_stream_and_costs_the_others_nothing(llm, monkeypatch, when, named):
    prompt, other_prompt = list(range(20)), list(range(100, 150))
    [expected] = llm.generate(prompt, PARAMS)
    llm.generate(list(range(200, 270)), PARAMS)  # fills the pool, so that room has to be made
    other = llm.generate(prompt, PARAMS, stream=True)
    token_ids = list(next(other).token_ids)

    interrupt_once(monkeypatch, llm.instance, when, named)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(other_prompt, PARAMS)
    for delta in other:
        token_ids += delta.token_ids
    assert token_ids == expected.token_ids
    [again] = llm.generate(prompt, PARAMS)
    assert again.token_ids == expected.token_ids

    llm.instance.check()
    stats = llm.instance.pool.stats()
    assert llm.instance.num_unfinished == 0 and stats.num_free + stats.num_evictable == stats.num_blocks
