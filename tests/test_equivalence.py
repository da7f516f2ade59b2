"""With HashRunner, every way to run a request gives the same answer: the whole product, in seconds."""

import functools
import itertools
import math

import numpy as np
import pytest
from mini_cluster import Options, hash_answer, hash_instance, serve

from memserve.kvcache import FIFO, LFU, LRU, AggregatedLayout, CostAware, DiscreteLayout, InVirtualTime, OnAThread
from memserve.sched.batching import PrefillFirst
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
        names = list(PROMPTS)[: {1: 6, 8: 14, 32: 34}[batch]]
        answers = serve(instance, {name: PROMPTS[name] for name in names}, MAX_TOKENS, check=pressure)
        assert answers == {name: EXPECTED[name] for name in names}, (chunk, batch, layout, pressure)
        assert instance.pool.stats().num_free + instance.pool.stats().num_indexed == instance.pool.num_blocks


FEW = dict(list(PROMPTS.items())[:9])
EVICTIONS = {"lru": LRU, "lfu": LFU, "fifo": FIFO, "cost_aware": lambda: CostAware(8.0, 2.0)}
WAYS = {"recompute": Recompute, "swap": SwapOut, "always": Always, "never": Never}
TIERED = list(itertools.product((1, 4, 16, 32), (DiscreteLayout, AggregatedLayout), (0.5, 3.0)))


def serve_twice_in_too_small_a_pool(block_size, layout, dram_share, **options):
    """HBM holds one and a half of the longest requests, DRAM that share of one. The counts, where nothing is wrong."""
    longest = -(-(90 + MAX_TOKENS) // block_size)
    instance = hash_instance(
        block_size=block_size,
        num_blocks=longest + longest // 2,
        num_dram_blocks=math.ceil(dram_share * longest),
        chunk_size=16 if layout is DiscreteLayout else None,
        token_budget=128,
        max_running=8,
        layout=layout(),
        **options,
    )
    expected = {name: EXPECTED[name] for name in FEW}
    assert serve(instance, FEW, MAX_TOKENS, check=block_size == 4) == expected, (block_size, layout, dram_share)
    again = {f"again-{name}": prompt for name, prompt in FEW.items()}
    assert list(serve(instance, again, MAX_TOKENS, check=False).values()) == list(expected.values())
    instance.pool.wait()
    instance.check()
    stats = instance.pool.stats()
    assert stats.num_free + stats.num_evictable == stats.num_blocks
    assert stats.num_free_dram + stats.num_evictable_dram == stats.num_dram_blocks
    counts = instance.scheduler.counts
    return np.array([counts.preemptions, stats.num_evicted, stats.num_swapped_out, stats.num_swapped_in])


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("swap", ["always", "never"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_answers_are_the_same_in_the_whole_product_of_ways_between_hbm_and_dram(preemption, swap, eviction):
    total = np.zeros(4, dtype=int)
    for block_size, layout, share in TIERED:
        options = {"preemption": WAYS[preemption](), "swap": WAYS[swap](), "eviction": EVICTIONS[eviction]()}
        total += serve_twice_in_too_small_a_pool(block_size, layout, share, **options)
    preempted, evicted, swapped_out, swapped_in = total
    assert preempted > 0 and evicted > 0 and swapped_out > 0
    assert (swapped_in > 0) == (preemption == "swap" or swap == "always")


ENGINES = {"a thread": OnAThread, "2 steps a block": functools.partial(InVirtualTime, seconds_for=lambda n: 2e-9 * n)}


@pytest.mark.parametrize(
    ("preemption", "engine", "swap_ahead_blocks"),
    [("recompute", "a thread", 0), ("recompute", "2 steps a block", 3), ("swap", "a thread", 3),
     ("swap", "2 steps a block", 0)],
)  # fmt: skip
def test_answers_are_the_same_where_blocks_are_copied_beside_compute(preemption, engine, swap_ahead_blocks):
    total = np.zeros(4, dtype=int)
    for block_size, layout, share in TIERED:
        options = {"preemption": WAYS[preemption](), "engine": ENGINES[engine], "swap_ahead_blocks": swap_ahead_blocks}
        total += serve_twice_in_too_small_a_pool(block_size, layout, share, **options)
    assert (total > 0).all()


@pytest.mark.parametrize("index", ["radix", "none"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_answers_are_the_same_where_prompts_have_steps_of_their_own(preemption, index):
    total = np.zeros(4, dtype=int)
    for block_size, layout, share in TIERED:
        for engine in ENGINES.values():
            options = {"preemption": WAYS[preemption](), "index": index, "engine": engine, "batching": PrefillFirst()}
            total += serve_twice_in_too_small_a_pool(block_size, layout, share, **options)
    assert total[0] > 0


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_answers_are_the_same_in_every_eviction_order_without_dram(eviction):
    total = np.zeros(4, dtype=int)
    for block_size, layout in itertools.product((1, 4, 16, 32), (DiscreteLayout, AggregatedLayout)):
        total += serve_twice_in_too_small_a_pool(block_size, layout, 0, eviction=EVICTIONS[eviction]())
    assert total[0] > 0 and total[1] > 0 and not total[2:].any()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_without_an_index_only_preemption_uses_dram(preemption):
    total = np.zeros(4, dtype=int)
    for block_size, layout, share in TIERED:
        options = {"index": "none", "preemption": WAYS[preemption]()}
        total += serve_twice_in_too_small_a_pool(block_size, layout, share, **options)
    assert total[0] > 0 and total[1] == 0 and (total[2:] > 0).tolist() == [preemption == "swap"] * 2


def test_no_round_of_requests_is_spared_preemption_swaps_and_evictions():
    instance = hash_instance(block_size=4, num_blocks=45, num_dram_blocks=50, preemption=SwapOut(), max_running=8)
    for name, prompt in list(PROMPTS.items())[:16]:
        before = np.array(pressure(instance))
        four = {f"{name}-{i}": np.append(prompt, i) for i in range(4)}
        assert serve(instance, four, 60, check=False) == {n: hash_answer(p, 60) for n, p in four.items()}
        assert (np.array(pressure(instance)) > before).all() or name == "r0", "the first has nothing to evict"


def pressure(instance):
    stats = instance.pool.stats()
    return instance.scheduler.counts.preemptions, stats.num_evicted, stats.num_swapped_out, stats.num_swapped_in


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
