"""With HashRunner, every way to run a request gives the same answer: the whole product, in seconds."""

import itertools

import numpy as np
import pytest
from mini_cluster import Options, hash_answer, hash_instance, serve

from memserve.kvcache import AggregatedLayout, DiscreteLayout
from memserve.sched.preemption import Recompute, SwapOut
from memserve.sched.queue_policy import FCFS, LongestPrefixFirst
from memserve.sched.swap_policy import Always, Never

MAX_TOKENS = 9


def prompts_that_share(count: int, seed: int) -> dict[str, np.ndarray]:
    """Prompts of 1 to 90 tokens; most share prefixes of odd lengths, some are equal, one is a prefix of another."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 1000, 60) for _ in range(3)]
    prompts = {}
    for i in range(count):
        stem = stems[i % 3][: int(rng.integers(0, 61))]
        tail = rng.integers(0, 1000, int(rng.integers(1, 31)))
        prompts[f"r{i}"] = stems[0] if i % 8 == 7 else np.concatenate([stem, tail])
    return prompts


PROMPTS = prompts_that_share(40, seed=1)
EXPECTED = {name: hash_answer(prompt, MAX_TOKENS) for name, prompt in PROMPTS.items()}

PRODUCT = list(
    itertools.product(
        ("radix", "none"), (1, 4, 16, 32), (16, 64, None), (1, 8, 32), (DiscreteLayout, AggregatedLayout), (False, True)
    )
)


@pytest.mark.parametrize("index", ["radix", "none"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_answers_are_the_same_in_the_whole_product(index, block_size):
    for i, b, chunk, batch, layout, pressure in PRODUCT:
        if (i, b) != (index, block_size):
            continue
        longest = -(-(90 + MAX_TOKENS) // block_size)
        options = Options(
            index=index,
            block_size=block_size,
            num_blocks=longest + longest // 2 if pressure else 4000,
            chunk_size=chunk,
            token_budget=max(batch, chunk or 128),
            max_running=batch,
            layout=layout(),
        )
        instance = hash_instance(options)
        assert serve(instance, PROMPTS, MAX_TOKENS, check=pressure) == EXPECTED, (chunk, batch, layout, pressure)
        assert instance.pool.stats().num_free + instance.pool.stats().num_indexed == instance.pool.num_blocks


TIERS = [(b, chunk, 8, layout, share) for b in (1, 4, 16) for share in (0.3, 3.0)
         for chunk, layout in ((16, DiscreteLayout), (None, AggregatedLayout))]  # fmt: skip


@pytest.mark.parametrize("preemption", [Recompute, SwapOut])
@pytest.mark.parametrize("swap", [Always, Never])
@pytest.mark.parametrize("index", ["radix", "none"])
def test_answers_are_the_same_however_kv_moves_between_hbm_and_dram(preemption, swap, index):
    swapped = preempted = 0
    for block_size, chunk, batch, layout, share in TIERS:
        longest = -(-(90 + MAX_TOKENS) // block_size)
        instance = hash_instance(
            index=index,
            block_size=block_size,
            num_blocks=longest + longest // 2,
            num_dram_blocks=int(share * longest) + 1,
            chunk_size=chunk,
            token_budget=max(batch, chunk or 128),
            max_running=batch,
            layout=layout(),
            preemption=preemption(),
            swap=swap(),
        )
        answers = serve(instance, PROMPTS, MAX_TOKENS, check=block_size == 4)
        assert answers == EXPECTED, (block_size, chunk, batch, layout, share)
        again = {f"again-{name}": prompt for name, prompt in PROMPTS.items()}
        assert list(serve(instance, again, MAX_TOKENS, check=False).values()) == list(EXPECTED.values())
        stats = instance.pool.stats()
        assert stats.num_free + stats.num_evictable == stats.num_blocks
        assert stats.num_free_dram + stats.num_evictable_dram == stats.num_dram_blocks
        swapped += stats.num_swapped_in
        preempted += instance.scheduler.counts.preemptions
    assert preempted > 0
    assert (swapped > 0) == (preemption is SwapOut or (swap is Always and index == "radix"))


def test_the_pool_under_pressure_did_preempt_and_evict():
    options = Options(block_size=4, num_blocks=37, max_running=32, token_budget=64)
    instance = hash_instance(options)
    assert serve(instance, PROMPTS, MAX_TOKENS) == EXPECTED
    assert instance.scheduler.counts.preemptions > 0 and instance.pool.stats().num_evicted > 0


@pytest.mark.parametrize("queue", [FCFS(), LongestPrefixFirst()])
def test_a_second_round_is_served_from_the_cache_with_the_same_answers(queue):
    instance = hash_instance(block_size=4, queue=queue)
    assert serve(instance, PROMPTS, MAX_TOKENS) == EXPECTED
    computed = instance.scheduler.counts.computed
    again = {f"again-{name}": prompt for name, prompt in PROMPTS.items()}
    assert list(serve(instance, again, MAX_TOKENS).values()) == list(EXPECTED.values())
    assert instance.scheduler.counts.computed - computed <= 5 * len(PROMPTS)


def test_history_is_cached_up_to_the_last_generated_token():
    instance = hash_instance(block_size=1)
    prompt = np.arange(20)
    answer = serve(instance, {"a": prompt}, 10)["a"]
    follow_up = np.concatenate([prompt, answer, [5, 6, 7]])
    assert serve(instance, {"b": follow_up}, 10)["b"] == hash_answer(follow_up, 10)
    assert instance.scheduler.counts.cached == 29  # the KV of the last generated token never exists


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8])
def test_a_fully_cached_prompt_still_computes_one_token(num_tokens):
    instance = hash_instance(block_size=4)
    prompt = np.arange(num_tokens)
    first = serve(instance, {"a": prompt}, 3)["a"]
    assert serve(instance, {"b": prompt}, 3)["b"] == first == hash_answer(prompt, 3)
    assert instance.scheduler.counts.cached == (num_tokens - 1) // 4 * 4


def test_a_block_lost_or_misplaced_changes_the_answer():
    prompt = np.arange(30)
    for damage in ("zero", "swap"):
        instance = hash_instance(block_size=4)
        serve(instance, {"a": prompt}, 1)
        kv = instance._runner._kv
        if damage == "zero":
            kv[1, 1, 3, 2] = 0
        else:
            kv[:, :, [2, 3]] = kv[:, :, [3, 2]]
        assert serve(instance, {"b": prompt}, 3)["b"] != hash_answer(prompt, 3)
